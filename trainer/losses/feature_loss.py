"""One feature map's term of the latent perceptual loss (Berrada et al., ICLR 2025, eq. 3), with its gradient in closed form.

What autograd would keep for the backward pass, several float32 copies of each map, is most of a loss's memory on maps of bf16
that are alive anyway. Here the maps themselves are kept, a mask of a byte a pixel and a few numbers a channel.

Shapes: maps BCHW, with pixels flattened BCN; statistics BC. phi is the target's map, phihat the estimate's.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.outliers import inlier_mask

Statistics = Literal["shared", "separate", "target_norm"]
VARIANCE_EPS = 1e-6
NORM_EPS = 1e-6
"""The public SDXL code's, added to the norm."""


def feature_loss(
    estimate_BCHW: Tensor,
    target_BCHW: Tensor,
    *,
    mask_outliers: bool,
    statistics: Statistics = "shared",
    mask_source: Literal["estimate", "target"] = "estimate",
    over_pixels: Literal["mean", "sum"] = "mean",
    detach_deviation: bool = False,
    whole_size: tuple[int, int] | None = None,
) -> Tensor:
    """Standardised squared difference, reduced over inlier pixels, then its mean over channels: (B,), without omega.

    shared: both maps divided by the estimate's deviation over inlier pixels; the mean cancels in the difference.
    separate: each map standardised by its own mean and deviation over the same pixels.
    target_norm: both divided, at each pixel, by the target's norm over the channels that are inliers there.

    A channel without inliers adds 0 and is still counted, and so does one which is constant over them where deviations
    scale the features. A sample with any feature that is not finite has a loss that is not finite, also under the mask.
    Computed in float32 at least, also under autocast. The target gets no gradient, and there is no second derivative.
    """
    assert not target_BCHW.requires_grad, "the target is a constant"
    inliers_BCN = None
    if mask_outliers:
        source = estimate_BCHW if mask_source == "estimate" else target_BCHW
        inliers_BCN = inlier_mask(source.detach(), whole_size).flatten(2)
    maps = estimate_BCHW.flatten(2), target_BCHW.flatten(2), inliers_BCN, over_pixels
    loss_B: Tensor
    if statistics == "target_norm":
        loss_B = _NormDistance.apply(*maps)
    else:
        loss_B = _DeviationDistance.apply(*maps, statistics == "separate", detach_deviation)
    return loss_B


class _DeviationDistance(torch.autograd.Function):
    """Of maps divided by deviations. With m the mask, n its pixels, (mu, s^2 = var + eps) the estimate's and (mu', s'^2) the
    target's, a channel's loss is the sum or mean of m d^2, where d = (f - mu)/s - (g - mu')/s'; where statistics are shared,
    mu' = mu and s' = s. Its gradient is m (A (f - mu) - B (g - mu')), A and B being numbers of the channel."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, f: Tensor, g: Tensor, inliers: Tensor | None, over_pixels: str, separate: bool, detach: bool
    ) -> Tensor:
        count_BC = _count(f, inliers)
        divisor_BC = _divisor(count_BC, over_pixels)
        # some inlier pixel, from which deviations are taken: a constant channel then has a variance of exactly 0
        at = None if inliers is None else inliers.view(torch.uint8).argmax(-1, keepdim=True)
        mean, centred = _centred(f, inliers, at, count_BC)
        if separate:
            target_mean, target_centred = _centred(g, inliers, at, count_BC)
            var, target_var = (c.square().sum(-1) / count_BC for c in (centred, target_centred))
            constant = (var == 0) | (target_var == 0)
            s, target_s = (var + VARIANCE_EPS).sqrt(), (target_var + VARIANCE_EPS).sqrt()
            centred /= s[..., None]
            d = centred - target_centred.div_(target_s[..., None])
            # what d gains by the estimate's own deviation
            share = (d * centred).sum(-1) / count_BC
            error = d.square_().sum(-1) / divisor_BC
        else:
            target_mean = mean
            var = centred.square_().sum(-1) / count_BC
            constant = var == 0
            s = target_s = (var + VARIANCE_EPS).sqrt()
            # `centred` has served, and a new tensor of its size costs more than what is done with it
            d = centred.copy_(f).sub_(g)
            error = _masked(d, inliers).square_().sum(-1) / s.square() / divisor_BC
            share = error * divisor_BC / count_BC
        # a constant channel counts as 0, but not where it hides what is not finite
        error = torch.where(constant & error.isfinite(), 0.0, error)
        factor = torch.where(constant, 0.0, 2.0 / (divisor_BC * s * f.shape[1]))
        of_f, of_g = factor * (1.0 if detach else 1.0 - share) / s, factor / target_s
        ctx.save_for_backward(f, g, inliers, of_f, of_g, mean, target_mean)
        return error.mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        f, g, inliers, of_f, of_g, mean, target_mean = ctx.saved_tensors
        gradient = (f - mean).mul_((grad_B[:, None] * of_f)[..., None])
        gradient -= (g - target_mean).mul_((grad_B[:, None] * of_g)[..., None])
        return _masked(gradient, inliers).to(f.dtype), None, None, None, None, None


class _NormDistance(torch.autograd.Function):
    """Of maps divided, at each pixel, by the target's norm N over channels: sum or mean of m ((f - g)/N)^2, whose gradient is
    2 m (f - g)/N^2 over the divisor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, f: Tensor, g: Tensor, inliers: Tensor | None, over_pixels: str
    ) -> Tensor:
        divisor_BC = _divisor(_count(f, inliers), over_pixels)
        buffer = _masked(g.to(_precise(g), copy=True), inliers)
        norm_B1N = buffer.square_().sum(1, keepdim=True).sqrt_() + NORM_EPS
        d = _masked(buffer.copy_(f).sub_(g), inliers).div_(norm_B1N)
        error = d.square_().sum(-1) / divisor_BC
        ctx.save_for_backward(f, g, inliers, 2.0 / (divisor_BC * f.shape[1]), norm_B1N)
        return error.mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        f, g, inliers, factor, norm_B1N = ctx.saved_tensors
        gradient = (f.to(norm_B1N.dtype) - g).mul_((grad_B[:, None] * factor)[..., None]).div_(norm_B1N.square())
        return _masked(gradient, inliers).to(f.dtype), None, None, None


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _count(values_BCN: Tensor, inliers_BCN: Tensor | None) -> Tensor:
    """Pixels that count in each channel (B, C); 1 where there is none, to divide by."""
    if inliers_BCN is None:
        return torch.full(
            values_BCN.shape[:2], values_BCN.shape[2], dtype=_precise(values_BCN), device=values_BCN.device
        )
    # summed as float32, exact up to 2^24 pixels: an eighth of the time of int64 on a CPU
    return inliers_BCN.sum(-1, dtype=_precise(values_BCN)).clamp_(min=1.0)


def _divisor(count_BC: Tensor, over_pixels: str) -> Tensor:
    return count_BC if over_pixels == "mean" else torch.ones_like(count_BC)


def _centred(
    values_BCN: Tensor, inliers_BCN: Tensor | None, at_BC1: Tensor | None, count_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over inliers (B, C, 1), and what remains of each pixel, 0 at outliers."""
    anchor_BC1 = (values_BCN[..., :1] if at_BC1 is None else values_BCN.gather(-1, at_BC1)).to(count_BC.dtype)
    centred = _masked(values_BCN - anchor_BC1, inliers_BCN)
    shift_BC1 = (centred.sum(-1) / count_BC)[..., None]
    return anchor_BC1 + shift_BC1, _masked(centred.sub_(shift_BC1), inliers_BCN)


def _masked(values_BCN: Tensor, inliers_BCN: Tensor | None) -> Tensor:
    """In place. A product, not a choice: what is not finite stays so."""
    return values_BCN if inliers_BCN is None else values_BCN.mul_(inliers_BCN)
