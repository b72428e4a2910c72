"""What a denoiser is told beside the timestep. B batch, L text tokens, T and P widths of tokens and pooled text."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    tokens_BLT: Tensor
    pooled_BP: Tensor | None = None
    """None: the encoders give none."""
    mask_BL: Tensor | None = None
    """True at tokens that are not padding; None: all are real."""
    labels_B: Tensor | None = None
    """Class numbers, int64, where the run is on classes; the number of classes itself stands for no class."""

    def first(self, count: int) -> "Condition":
        """Of the first so many samples."""
        return _of([None if x is None else x[:count] for x in _tensors(self)])


def joined(conditions: Sequence[Condition]) -> Condition:
    """Of all their samples, in order; one encoder's, so alike in length."""
    parts = zip(*map(_tensors, conditions), strict=True)
    return _of([None if part[0] is None else torch.cat(part) for part in parts])


def _tensors(condition: Condition) -> list[Tensor | None]:
    return [getattr(condition, field.name) for field in fields(condition)]


def _of(tensors: Sequence[Tensor | None]) -> Condition:
    tokens_BLT, *others = tensors
    assert tokens_BLT is not None
    return Condition(tokens_BLT, *others)
