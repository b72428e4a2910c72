"""Noise schedules and timestep densities: pure functions, float64.

`z_t = alpha_t z_0 + sigma_t eps`; t = 0 is data. Legend of shapes: T timesteps, B batch.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
"""T of the DDPM schedules."""


# -------------------------------------------------------------------------------------------------- DDPM, tables over T


def scaled_linear_alphas_cumprod(
    num_timesteps: int = NUM_TIMESTEPS, beta_start: float = 0.00085, beta_end: float = 0.012
) -> np.ndarray:
    """abar_t (T,) of the schedule that is linear in sqrt(beta) (Rombach et al. 2022; the paper's "quadratic")."""
    betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas)


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Move the last signal level to 0 and keep the first (Lin et al. 2024, algorithm 1)."""
    a = np.sqrt(alphas_cumprod)
    return ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2


def shift_alphas_cumprod(alphas_cumprod: np.ndarray, ratio: float) -> np.ndarray:
    """The schedule at a side `ratio` times larger: SNR' = SNR / ratio**2, so sigma/alpha grows by `ratio`."""
    return alphas_cumprod / (alphas_cumprod + ratio**2 * (1.0 - alphas_cumprod))


# ------------------------------------------------------- timestep densities, as monotone maps of u in [0, 1) to [0, 1]

Density = Callable[[Tensor], Tensor]
"""From uniform numbers (B,) to times (B,), before any shift: monotone, so evenly spread u give evenly spread times."""


def uniform_time(u_B: Tensor) -> Tensor:
    return u_B


def mode_time(u_B: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails, Esser et al. 2024, eq. 20: falls from t = 1 at u = 0 to t = 0 at u = 1.

    Monotone for scales from -1 to 2/(pi - 2) (section 3.1), which the config holds.
    """
    return 1.0 - u_B - scale * (torch.cos(math.pi / 2 * u_B) ** 2 - 1.0 + u_B)


def logit_normal_time(u_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t whose logit is normal (Esser et al. 2024, eq. 19); u = 0 gives t = 0."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u_B))


def cosmap_time(u_B: Tensor) -> Tensor:
    """CosMap, Esser et al. 2024, eq. 21 and 22: log SNR has the density that the cosine schedule gives it.

    t = 1 - 1/(tan(pi u/2) + 1), of density 2/(pi - 2 pi t + 2 pi t**2).
    """
    sin_B, cos_B = torch.sin(math.pi / 2 * u_B), torch.cos(math.pi / 2 * u_B)
    return sin_B / (sin_B + cos_B)  # the same, exact at small t as well


def shift_time(t_B: Tensor, ratio: float) -> Tensor:
    """Flow time at a side `ratio` times larger (Esser et al. 2024, eq. 23): t/(1-t) grows by `ratio`.

    `ratio` is sqrt(m/n) of m against n image tokens.
    """
    return ratio * t_B / (1.0 + (ratio - 1.0) * t_B)
