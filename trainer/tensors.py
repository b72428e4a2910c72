"""Small conversions of tensors: pixels, and sharded tensors to this rank's part or the whole."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def pixels_to_images(pixels_BCHW: Tensor) -> Tensor:
    """uint8 pixels to the float32 images in [-1, 1] that autoencoders take."""
    return pixels_BCHW.float() / 127.5 - 1.0


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in tensors]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor (a collective when it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
