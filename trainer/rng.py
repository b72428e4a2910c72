"""Randomness as a function of (seed, stream position, purpose).

Stream position is a sample's place in the whole run. A rank's number must not matter, else a run could not repeat itself
on another number of ranks; a row of the dataset must not either, else each epoch would repeat its noise.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from data import draws

Purpose = Literal["noise", "timestep", "caption_dropout", "posterior", "sample"]


def normal(
    seed: int, positions: Sequence[int], purpose: Purpose, shape: Sequence[int], *, device: torch.device
) -> Tensor:
    """Standard normal float32 of shape (len(positions), *shape), drawn on `device`: repeatable on the same kind of one."""
    generator = torch.Generator(device)
    out = torch.empty((len(positions), *shape), device=device)
    for row, position in zip(out, positions, strict=True):
        generator.manual_seed(int(draws.raw(seed, purpose, position, count=1)[0]))
        row.normal_(generator=generator)
    return out


def uniform(seed: int, positions: Sequence[int], purpose: Purpose) -> Tensor:
    """Float64 in [0, 1) of shape (len(positions),), on the CPU."""
    return torch.tensor([draws.uniform(seed, purpose, position)[0] for position in positions], dtype=torch.float64)
