"""Small conversions of tensors: pixels, and sharded tensors to this rank's part or the whole."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def pixels_to_images(pixels_BCHW: Tensor) -> Tensor:
    """uint8 pixels to the float32 images in [-1, 1] that autoencoders take."""
    return pixels_BCHW.float() / 127.5 - 1.0


def images_to_pixels(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 pixels, rounded and clamped: what people see."""
    return ((images_BCHW.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in tensors]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor (a collective when it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(whole: Tensor, target: Tensor) -> None:
    """A whole tensor, the same on every rank, into `target`, sharded or not, in place."""
    if isinstance(target, DTensor):
        # every rank has the whole, so each cuts out its part without a word
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.detach().copy_(whole)
