"""Outliers of the decoder's deeper feature maps: Algorithm 1 of Berrada et al. (ICLR 2025, section A.3).

Some pixels of some channels are orders of magnitude larger than the others and would rule any mean. The mask is exact, and on
a GPU nothing here waits for the device.
"""

import math

import torch
from torch import Tensor

KERNEL_REFERENCE_SIDE = 512
"""Side of a feature map, in pixels, at which Algorithm 1's kernels of 3 and 5 hold."""
CLOSING, OPENING = 3, 5


@torch.no_grad()
def inlier_mask(features_BCHW: Tensor, whole_size: tuple[int, int] | None = None) -> Tensor:
    """True where a pixel is no outlier of its channel; bool, of the features' shape.

    `whole_size`: height and width of the map that the features are a part of, whose kernels are taken.

    Thresholds are float32 at least; values are compared as they are, so lower precision loses nothing.
    """
    h, w = features_BCHW.shape[-2:]
    n = h * w
    features_BCN = features_BCHW.flatten(2)
    # k counts from 1. Fewer than 50 pixels would give k = 0. Integers, because 0.98 * n may round below a whole number.
    low_BC, high_BC = smallest(features_BCN, max(1, n * 2 // 100), max(1, n * 98 // 100))
    margin_BC = 2.0 * _deviation(features_BCN)
    low_BC11 = (low_BC - margin_BC)[..., None, None]
    high_BC11 = (high_BC + margin_BC)[..., None, None]
    mask = (low_BC11 < features_BCHW).logical_and_(features_BCHW < high_BC11)

    closing, opening = kernel_sizes(*(whole_size or (h, w)))
    mask = _any_near(mask, closing // 2)
    return _any_near(mask.logical_not_(), opening // 2).logical_not_() if opening > 1 else mask


def smallest(values_BCN: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """The `first` and the `second` smallest of each channel (B, C), counted from 1, `first` <= `second`; float32 at least.
    NaN counts as the largest."""
    dtype = torch.promote_types(values_BCN.dtype, torch.float32)
    if values_BCN.device.type != "cpu":
        # By radix: in the features' own precision it takes half the passes. They must lie beside each other for it.
        values_BCN = values_BCN.contiguous()
        return values_BCN.kthvalue(first).values.to(dtype), values_BCN.kthvalue(second).values.to(dtype)
    # numpy selects with vector instructions, a tenth of the time of two `kthvalue`, where values lie beside each other.
    array = values_BCN.detach().to(dtype, copy=True, memory_format=torch.contiguous_format).numpy()
    array.partition(first - 1, axis=-1)
    low_BC = torch.from_numpy(array[..., first - 1].copy())
    # the second is among those that are no smaller; finding it moves them
    rest = array[..., first - 1 :]
    rest.partition(second - first, axis=-1)
    return low_BC, torch.from_numpy(rest[..., second - first].copy())


def _deviation(values_BCN: Tensor) -> Tensor:
    """Standard deviation (B, C), divisor n - 1: exactly 0 for a constant. On a CPU, `Tensor.std` takes ten times as long."""
    dtype = torch.promote_types(values_BCN.dtype, torch.float32)
    deviations_BCN = values_BCN - values_BCN[..., :1].to(dtype)
    deviations_BCN.sub_(deviations_BCN.mean(-1, keepdim=True))
    return (deviations_BCN.square_().sum(-1) / max(1, values_BCN.shape[-1] - 1)).sqrt()


def _any_near(mask_BCHW: Tensor, reach: int) -> Tensor:
    """True where some pixel within `reach`, along both axes, is. What lies beyond the border is not.

    That is max-pooling with stride 1, which on bytes is a few shifts: a fiftieth of `max_pool2d`'s time on a CPU, and none
    of its indices, which would be eight bytes a pixel.
    """
    for dim in (-2, -1) if reach else ():
        size = mask_BCHW.shape[dim]
        out = mask_BCHW.clone()
        for shift in range(1, min(reach, size - 1) + 1):
            out.narrow(dim, shift, size - shift).logical_or_(mask_BCHW.narrow(dim, 0, size - shift))
            out.narrow(dim, 0, size - shift).logical_or_(mask_BCHW.narrow(dim, shift, size - shift))
        mask_BCHW = out
    return mask_BCHW


def kernel_sizes(height: int, width: int) -> tuple[int, int]:
    """(closing, opening) of Algorithm 1 for a map of this size: the same share of the image at every depth, always odd.

    An opening of 2 becomes 3 and a closing of 2 becomes 1, as printed; larger even ones, of which the paper says
    nothing and which would move the map by half a pixel, the next odd.
    """
    side = math.sqrt(height * width)
    closing, opening = (math.ceil(k * side / KERNEL_REFERENCE_SIDE) for k in (CLOSING, OPENING))
    closing = 1 if closing == 2 else closing + (closing % 2 == 0)
    opening = opening + (opening % 2 == 0)
    return closing, opening
