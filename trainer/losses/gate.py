"""Which samples a perceptual loss counts for: those whose noise level sigma/alpha is within a bound (Eq. 3)."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from trainer.config import PhasePerceptualConfig
from trainer.diffusion.paradigms import Paradigm
from trainer.diffusion.schedules import NUM_TIMESTEPS


def threshold(phase: PhasePerceptualConfig, paradigm: Paradigm, resolution: int, reference_px: int | None) -> float:
    """Largest noise level at which the loss counts: tau at this resolution, or that of the phase's time bound."""
    if phase.max_time is not None:
        return _level_below(paradigm, phase.max_time)
    return scaled_tau(phase.tau, resolution, reference_px) if phase.tau is not None else math.inf


def scaled_tau(tau: float, resolution: int, reference_px: int | None) -> float:
    """tau at a resolution: it grows with the side, as noise levels of equal uncertainty per patch do (section 4.1)."""
    return tau * resolution / reference_px if reference_px else tau


@functools.lru_cache(maxsize=64)  # asked in every step
def _level_below(paradigm: Paradigm, max_time: float) -> float:
    """Largest noise level of the times below `max_time`, of 1000. Levels grow with time."""
    times = _training_times(paradigm)
    below = times[paradigm.model_time(times) < max_time * (NUM_TIMESTEPS / 1000)]
    return paradigm.noise_level(below).max().item() if len(below) else 0.0


def _training_times(paradigm: Paradigm) -> Tensor:
    """Times of 100,000 evenly spread draws: what training sees, to about 1e-5."""
    num_points = 100_000
    return paradigm.sample_t((torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points)


@functools.lru_cache(maxsize=16)
def training_levels(paradigm: Paradigm) -> Tensor:
    """Their noise levels, float64."""
    return paradigm.noise_level(_training_times(paradigm)).double()


def inside(noise_level_B: Tensor, bound: float) -> Tensor:
    """Row numbers of the samples that count, on the host. A level that is NaN is outside."""
    assert noise_level_B.device.type == "cpu", "the gate is decided on the host; noise levels must be there"
    return torch.from_numpy(np.flatnonzero(noise_level_B.numpy() <= bound))


def gate_share(paradigm: Paradigm, bound: float) -> float:
    """Share of training samples whose noise level is within `bound`, to about 1e-5; for a check at start."""
    return (training_levels(paradigm) <= bound).double().mean().item()
