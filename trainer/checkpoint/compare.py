"""What differs between two checkpoints, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.opened import NO_PROGRESS, OpenedCheckpoint


@dataclass(frozen=True)
class TensorDifference:
    name: str
    largest: float
    """Of the elements' differences, where both sides have a number."""
    relative: float
    """Norm of those differences over that of the first."""
    nan: int
    """Elements that are NaN on one side alone."""


@dataclass(frozen=True)
class Comparison:
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    other_shape: tuple[tuple[str, str, str], ...]
    """Name, and type and shape of both."""
    equal: int
    """Tensors that are the same bit by bit; of NaN, two at one place are, whatever bits they have."""
    different: tuple[TensorDifference, ...]
    """Those with NaN on one side first, then the relatively largest."""

    @property
    def same(self) -> bool:
        return not (self.only_here or self.only_there or self.other_shape or self.different)


def compare(
    here: OpenedCheckpoint, there: OpenedCheckpoint, *, prefix: str = "", on_bytes: Callable[[int], None] = NO_PROGRESS
) -> Comparison:
    """
    Args:
        prefix: of the names that are compared, such as `ema.`.
        on_bytes: told how many were read of both.

    Raises:
        CorruptCheckpoint: one is damaged.
    """
    ours, theirs = ({n: r for n, r in c.index.tensors.items() if n.startswith(prefix)} for c in (here, there))
    shapes = [
        (name, f"{r.dtype} {list(r.size)}", f"{theirs[name].dtype} {list(theirs[name].size)}")
        for name, r in ours.items()
        if name in theirs and (r.dtype, r.size) != (theirs[name].dtype, theirs[name].size)
    ]
    common = [name for name in ours if name in theirs and name not in {s[0] for s in shapes}]
    equal, different = 0, []
    for part in here.parts(common):
        first, second = here.read(part), there.read(part)
        for name in part:
            found = _difference(name, first[name], second[name])
            if found is None:
                equal += 1
            else:
                different.append(found)
        on_bytes(sum(here.num_bytes(name) for name in part) * 2)
    return Comparison(
        tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours), tuple(shapes), equal,
        tuple(sorted(different, key=lambda d: (not d.nan, -d.relative))),
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    """(elements, bytes of one), uint8."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _difference(name: str, first: Tensor, second: Tensor) -> TensorDifference | None:
    """None where there is none."""
    bits_a, bits_b = _bits(first), _bits(second)
    if torch.equal(bits_a, bits_b):
        return None
    a, b = first.reshape(-1).double(), second.reshape(-1).double()
    nan_a, nan_b = a.isnan(), b.isnan()
    differs = (bits_a != bits_b).any(1) & ~(nan_a & nan_b)
    if not differs.any():
        return None
    numbers = differs & ~nan_a & ~nan_b
    difference = (a - b)[numbers]
    norm = torch.linalg.vector_norm(a[a.isfinite()])
    off = torch.linalg.vector_norm(difference)
    relative = off / norm if norm > 0 else torch.tensor(float("inf") if off > 0 else 0.0)
    largest = difference.abs().max().item() if len(difference) else 0.0
    return TensorDifference(name, largest, relative.item(), int((nan_a ^ nan_b).sum()))
