"""Randomness as a function of (seed, stream position, purpose).

Stream position is a sample's place in the whole run. A rank's number must not matter, else a run could not repeat itself
on another number of ranks; a row of the dataset must not either, else each epoch would repeat its noise.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data import draws

_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C16)
"""(sqrt(5) - 1) / 2 in units of 2**-64: of all numbers the worst to approximate by fractions, so its multiples modulo 1
spread the most evenly."""

Purpose = Literal[
    "noise", "timestep", "caption_dropout", "encoder_dropout", "posterior", "sample", "second_noise", "second_timestep",
    "estimator", "augmentation", "transform", "codebook",
]  # fmt: skip


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
    return uniforms(seed, positions, purpose, count=1)[0]


def uniforms(seed: int, positions: Sequence[int], purpose: Purpose, *, count: int) -> Tensor:
    """Float64 in [0, 1) of shape (count, len(positions)), on the CPU."""
    rows = np.stack([draws.uniform(seed, purpose, position, count=count) for position in positions])
    return torch.from_numpy(rows.T.copy())


def spread_uniform(seed: int, positions: Sequence[int], step: int) -> Tensor:
    """Timestep draws that are spread evenly over a step: frac(golden * position + shift(seed, step)).

    Each number alone is uniform, over steps; n neighbouring positions of one step are even to O(log n / n), where
    independent draws are to O(1 / sqrt(n)). So ranks, which hold neighbouring positions, get much the same noise levels.

    Returns:
        Float64 in [0, 1) of shape (len(positions),), on the CPU; exact at any position, as integers modulo 2**64.
    """
    positions_B = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    shift = draws.raw(seed, "timestep_shift", step, count=1)
    top_53_bits_B = (positions_B * _GOLDEN + shift) >> np.uint64(11)  # wraps modulo 2**64
    return torch.from_numpy(top_53_bits_B.astype(np.float64) * 2.0**-53)
