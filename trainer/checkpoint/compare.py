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
    """Of the elements' differences; NaN where one side alone is not finite."""
    relative: float
    """Norm of the difference over that of the first."""


@dataclass(frozen=True)
class Comparison:
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    other_shape: tuple[tuple[str, str, str], ...]
    """Name, and type and shape of both."""
    equal: int
    """Tensors that are the same bit by bit."""
    different: tuple[TensorDifference, ...]
    """The relatively largest first."""

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
            if torch.equal(_bits(first[name]), _bits(second[name])):
                equal += 1
            else:
                different.append(_difference(name, first[name], second[name]))
        on_bytes(sum(here.num_bytes(name) for name in part) * 2)
    return Comparison(
        tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours), tuple(shapes), equal,
        tuple(sorted(different, key=lambda d: (d.relative == d.relative, -d.relative))),
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _difference(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    a, b = first.double(), second.double()
    difference = a - b
    norm = torch.linalg.vector_norm(a)
    relative = torch.linalg.vector_norm(difference) / norm if norm > 0 else torch.tensor(float("inf"))
    return TensorDifference(name, difference.abs().max().item(), relative.item())
