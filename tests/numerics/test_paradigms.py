"""Paradigms: conversions round-trip in float64, targets and estimates are inverses, dtypes and ends hold."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import ParadigmConfig
from trainer.diffusion import paradigms, schedules
from trainer.diffusion.paradigms import DDPMV, DDPMEps, FlowOT, Paradigm, build_paradigm
from trainer.errors import UserError

KINDS = ("ddpm_eps", "ddpm_v", "flow")


def build(kind, **options) -> Paradigm:
    return build_paradigm(ParadigmConfig(kind=kind, **options), resolution=512)


def latents(batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z0, noise = torch.randn(2, batch, 4, 3, 5, generator=generator, dtype=torch.float64).to(dtype).unbind()
    return z0, noise


small_to_large = st.floats(1e-3, 1 - 1e-3)
value = st.floats(-10, 10)


@settings(max_examples=300)
@given(small_to_large, value, value)
def test_every_conversion_pair_of_ddpm_round_trips(alpha_: float, z0_: float, eps_: float) -> None:
    alpha = torch.tensor(alpha_, dtype=torch.float64)
    check_pairs(alpha, (1 - alpha**2).sqrt(), z0_, eps_, "v", lambda a, s, z0, eps: a * eps - s * z0)


@settings(max_examples=300)
@given(small_to_large, value, value)
def test_every_conversion_pair_of_flow_round_trips(t: float, z0_: float, eps_: float) -> None:
    alpha = 1.0 - torch.tensor(t, dtype=torch.float64)
    check_pairs(alpha, 1.0 - alpha, z0_, eps_, "velocity", lambda a, s, z0, eps: eps - z0)


def check_pairs(alpha, sigma, z0_: float, eps_: float, name: str, predict) -> None:
    z0, eps = torch.tensor(z0_, dtype=torch.float64), torch.tensor(eps_, dtype=torch.float64)
    truth = {"z0": z0, "eps": eps, name: predict(alpha, sigma, z0, eps)}
    zt = alpha * z0 + sigma * eps
    convert = {
        (a, b): getattr(paradigms, f"{a}_to_{b}") for a in truth for b in truth if a != b
    }  # all six, by their names
    for (a, b), function in convert.items():
        there = function(truth[a], zt, alpha, sigma)
        assert (there - truth[b]).abs() <= 1e-10, (a, b)
        back = convert[b, a](there, zt, alpha, sigma)
        assert (back - truth[a]).abs() <= 1e-10, (a, b, a)


def test_no_conversion_is_left_untested() -> None:
    names = [n for n, f in inspect.getmembers(paradigms, inspect.isfunction) if "_to_" in n]
    assert len(names) == 2 + 4 + 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gives_back_latents_and_noise(kind: str) -> None:
    paradigm = build(kind)
    t = paradigm.sample_t(torch.linspace(0.01, 0.98, 64, dtype=torch.float64))
    z0, noise = latents(64)
    zt = paradigm.add_noise(z0, noise, t)
    target = paradigm.target(z0, noise, t)
    torch.testing.assert_close(paradigm.to_z0(target, zt, t), z0, rtol=0, atol=1e-10)
    torch.testing.assert_close(paradigm.to_eps(target, zt, t), noise, rtol=0, atol=1e-10)


def test_coefficients_are_table_1() -> None:
    t = torch.tensor([0, 10, 500, 999])
    abar = torch.from_numpy(schedules.scaled_linear_alphas_cumprod())[t]
    alpha, sigma = build("ddpm_eps").alpha_sigma(t)
    torch.testing.assert_close(alpha, abar.sqrt().float())
    torch.testing.assert_close(sigma, (1 - abar).sqrt().float())
    alpha, sigma = build("flow").alpha_sigma(torch.tensor([0.0, 0.25, 1.0]))
    assert alpha.tolist() == [1.0, 0.75, 0.0]
    assert sigma.tolist() == [0.0, 0.25, 1.0]


def test_targets_are_table_1() -> None:
    z0, noise = latents(3)
    t = torch.tensor([3, 400, 999])
    assert torch.equal(build("ddpm_eps").target(z0, noise, t), noise)
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in build("ddpm_v")._alpha_sigma_float64(t))
    torch.testing.assert_close(build("ddpm_v").target(z0, noise, t), alpha * noise - sigma * z0)
    assert torch.equal(build("flow").target(z0, noise, t / 1000), noise - z0)


@pytest.mark.parametrize("kind", ["ddpm_v", "flow"])
def test_at_pure_noise_the_estimate_is_minus_the_prediction_s_share(kind: str) -> None:
    paradigm = build(kind)
    t = torch.tensor([999]) if kind == "ddpm_v" else torch.tensor([1.0])
    z0, noise = latents(1)
    assert paradigm.noise_level(t).item() == math.inf
    assert torch.equal(paradigm.add_noise(z0, noise, t), noise)
    torch.testing.assert_close(paradigm.to_z0(paradigm.target(z0, noise, t), noise, t), z0, rtol=0, atol=1e-12)


def test_eps_is_refused_where_alpha_is_zero_and_finite_elsewhere() -> None:
    with pytest.raises(AssertionError, match="alpha is 0"):
        DDPMEps(schedules.zero_terminal_snr(schedules.scaled_linear_alphas_cumprod()))
    paradigm = build_paradigm(ParadigmConfig(kind="ddpm_eps", shift_base_px=1), resolution=1024)
    z0, _ = latents(1, dtype=torch.float32)
    estimate = paradigm.to_z0(-10 * z0, z0, torch.tensor([999]))
    assert estimate.isfinite().all()
    assert estimate.abs().max() > 1e4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(kind: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    """Times drawn in float64 do not turn float32 latents into float64 ones; bf16 latents give float32."""
    paradigm = build(kind)
    t = paradigm.sample_t(torch.tensor([0.2, 0.7], dtype=torch.float64))
    z0, noise = latents(2, dtype=dtype)
    zt = paradigm.add_noise(z0, noise, t)
    assert zt.dtype == expected
    assert paradigm.to_z0(zt, zt, t).dtype == expected
    assert paradigm.noise_level(t).dtype == paradigm.model_time(t).dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in paradigm.alpha_sigma(t))


def test_model_time_runs_to_1000() -> None:
    assert build("ddpm_eps").model_time(torch.tensor([0, 999])).tolist() == [0.0, 999.0]
    assert build("flow").model_time(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]


def test_tables_are_moved_once_for_each_device() -> None:
    paradigm = build("ddpm_v")
    assert isinstance(paradigm, DDPMV)
    t = torch.tensor([5])
    paradigm.noise_level(t)
    (table,) = paradigm._tables.values()
    paradigm.add_noise(*latents(1), t)
    assert next(iter(paradigm._tables.values())) is table
    assert paradigm.noise_level(t.to("meta")).device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_through_the_estimate(kind: str) -> None:
    paradigm = build(kind)
    z0, noise = latents(2, dtype=torch.float32)
    t = paradigm.sample_t(torch.tensor([0.3, 0.6]))
    pred = noise.clone().requires_grad_()
    paradigm.to_z0(pred, paradigm.add_noise(z0, noise, t), t).sum().backward()
    alpha, sigma = paradigm.alpha_sigma(t)
    slope = -sigma / alpha if kind == "ddpm_eps" else -sigma
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad, slope.view(-1, 1, 1, 1).expand_as(pred))


def test_build_refuses_flow_densities_for_ddpm() -> None:
    with pytest.raises(UserError, match=r"task\.paradigm\.timestep_density: mode is for flow"):
        build("ddpm_v", timestep_density="mode")
    assert isinstance(build("flow"), FlowOT)
