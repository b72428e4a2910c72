"""Schedules and shifts against their closed forms."""

import math

import numpy as np
import pytest
import torch

from tests.numerics.test_timesteps import DENSITIES
from trainer.config import ParadigmConfig
from trainer.diffusion import schedules
from trainer.diffusion.paradigms import build_paradigm


def grid(n: int = 200_001) -> torch.Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)[:-1]


def test_scaled_linear_is_the_product_of_one_minus_beta() -> None:
    abar = schedules.scaled_linear_alphas_cumprod()
    product = 1.0
    for i in range(1000):
        product *= 1.0 - (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
        assert abar[i] == pytest.approx(product, rel=1e-12)
    assert abar[-1] == pytest.approx(0.004660, abs=1e-6)  # what Stable Diffusion's schedule is known to end at
    assert abar.dtype == np.float64


def test_zero_terminal_snr_keeps_the_first_level_and_ends_at_zero() -> None:
    abar = schedules.scaled_linear_alphas_cumprod()
    rescaled = schedules.zero_terminal_snr(abar)
    assert rescaled[-1] == 0.0
    assert rescaled[0] == pytest.approx(abar[0], rel=1e-14)
    assert (np.diff(rescaled) < 0).all()
    a, b = np.sqrt(abar), np.sqrt(rescaled)
    np.testing.assert_allclose(np.diff(b), np.diff(a) * a[0] / (a[0] - a[-1]), rtol=1e-9)  # one affine map of alpha


@pytest.mark.parametrize(("kind", "density"), DENSITIES)
@pytest.mark.parametrize(("resolution", "ratio"), [(256, 0.5), (512, 1.0), (1024, 2.0)])
def test_shift_multiplies_the_noise_level_by_the_ratio_of_sides(kind, density, resolution: int, ratio: float) -> None:
    """After the density, whichever it is."""
    config = ParadigmConfig(kind=kind, timestep_density=density)
    plain = build_paradigm(config, resolution=resolution)
    shifted = build_paradigm(config.model_copy(update={"shift_base_px": 512}), resolution=resolution)
    u = grid(1001)[1:]
    before, after = (p.noise_level(p.sample_t(u)).double() for p in (plain, shifted))
    torch.testing.assert_close(after, ratio * before, rtol=1e-6, atol=0.0)
    snr_before, snr_after = before**-2, after**-2
    torch.testing.assert_close(snr_after, (512 / resolution) ** 2 * snr_before, rtol=1e-5, atol=0.0)


def test_flow_shift_is_the_published_formula() -> None:
    m, n = 64 * 64, 32 * 32  # image tokens
    a = math.sqrt(m / n)
    t = grid(101)
    torch.testing.assert_close(schedules.shift_time(t, 2.0), a * t / (1 + (a - 1) * t), rtol=1e-14, atol=0.0)
