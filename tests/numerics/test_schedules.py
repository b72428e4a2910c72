"""Schedules and timestep densities against their closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.config import ParadigmConfig
from trainer.diffusion import schedules
from trainer.diffusion.paradigms import build_paradigm
from trainer.errors import UserError


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


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v", "flow"])
@pytest.mark.parametrize(("resolution", "ratio"), [(256, 0.5), (512, 1.0), (1024, 2.0)])
def test_shift_multiplies_the_noise_level_by_the_ratio_of_sides(kind, resolution: int, ratio: float) -> None:
    config = ParadigmConfig(kind=kind)
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


def density(kind: str, u: torch.Tensor, scale: float = 1.29) -> torch.Tensor:
    config = ParadigmConfig(kind="flow", timestep_density=kind, mode_scale=scale)  # type: ignore[arg-type]
    return build_paradigm(config, resolution=512).sample_t(u)


def test_uniform_times_are_uniform() -> None:
    assert torch.equal(density("uniform", grid()), grid())


def test_logit_normal_times_have_the_logit_normal_distribution() -> None:
    t = density("logit_normal", grid())
    assert t[0] == 0.0
    for x in (0.05, 0.3, 0.5, 0.8, 0.99):
        normal_cdf = 0.5 * (1 + math.erf(math.log(x / (1 - x)) / math.sqrt(2)))
        assert (t <= x).double().mean().item() == pytest.approx(normal_cdf, abs=2e-5)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.0, 1.29, 1.6])
def test_mode_times_have_the_density_of_the_inverse_slope(scale: float) -> None:
    u = grid()
    t = density("mode", u, scale)
    assert t.min() >= 0.0
    assert t[0] == 1.0
    assert (t.diff() < 0).all()
    # pi(t) = 1/|f'(u)| at t = f(u), by its change of the distribution over a small interval
    for at in (0.1, 0.3, 0.5, 0.7, 0.9):
        slope = -1.0 - scale * (1.0 - math.pi / 2 * math.sin(math.pi * at))
        middle = schedules.mode_time(torch.tensor(at, dtype=torch.float64), scale).item()
        width = 5e-3 * abs(slope)
        share = ((t > middle - width / 2) & (t < middle + width / 2)).double().mean().item()
        assert share / width == pytest.approx(1 / abs(slope), rel=5e-3)


def test_mode_sampling_prefers_the_middle_and_has_heavy_tails() -> None:
    t = density("mode", grid())
    share = lambda low, high: ((t > low) & (t <= high)).double().mean().item()  # noqa: E731
    assert share(0.45, 0.55) > 0.2
    assert share(0.0, 0.05) == pytest.approx(share(0.95, 1.0), abs=1e-4)
    assert share(0.0, 0.05) > 0.02  # logit-normal: 0.0016


@pytest.mark.parametrize("scale", [-1.1, 1.76, 3.0])
def test_mode_scales_that_fold_time_are_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"task\.paradigm\.mode_scale: .* is not within -1 to 1\.7519"):
        density("mode", grid(11), scale)


@given(st.integers(0, 2**24 - 1))
@example(855638)  # float32 times 1000 rounds up to 51
@example(2**24 - 1)
def test_ddpm_times_are_uniform_indices_for_every_float32(numerator: int) -> None:
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=512)
    t = paradigm.sample_t(torch.tensor([numerator / 2**24], dtype=torch.float32))
    assert t.dtype == torch.int64
    assert t.item() == numerator * 1000 // 2**24


def test_ddpm_times_cover_each_index_equally() -> None:
    t = build_paradigm(ParadigmConfig(kind="ddpm_v"), resolution=512).sample_t(grid(100_001) + 5e-6)
    assert (torch.bincount(t, minlength=1000) == 100).all()


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_flow_times_stay_within_0_and_1(u: float) -> None:
    for kind in ("uniform", "mode", "logit_normal"):
        t = density(kind, torch.tensor([u], dtype=torch.float32))
        assert t.dtype == torch.float32
        assert 0.0 <= t.item() <= 1.0
