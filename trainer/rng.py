"""Randomness as a function of (seed, stream position, purpose).

Stream position is a sample's place in the whole run. A rank's number must not matter, else a run could not repeat itself
on another number of ranks; a row of the dataset must not either, else each epoch would repeat its noise.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["noise", "timestep", "caption_dropout", "posterior", "sample"]


def _key(seed: int, position: int, purpose: Purpose) -> int:
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def normal(
    seed: int, positions: Sequence[int], purpose: Purpose, shape: Sequence[int], *, device: torch.device
) -> Tensor:
    """Standard normal float32 of shape (len(positions), *shape), drawn on `device`: repeatable on the same kind of one."""
    generator = torch.Generator(device)
    out = torch.empty((len(positions), *shape), device=device)
    for row, position in zip(out, positions, strict=True):
        generator.manual_seed(_key(seed, position, purpose))
        row.normal_(generator=generator)
    return out


def uniform(seed: int, positions: Sequence[int], purpose: Purpose) -> Tensor:
    """Float64 in [0, 1) of shape (len(positions),), on the CPU. 53 bits of a cryptographic hash: even at any position."""
    return torch.from_numpy(np.array([(_key(seed, p, purpose) >> 11) * 2.0**-53 for p in positions], dtype=np.float64))
