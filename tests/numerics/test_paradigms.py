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


# ------------------------------------------------------------------------------------------------------- loss weighting


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_weighting_leaves_the_squared_error_alone(kind: str) -> None:
    t = build(kind).sample_t(torch.rand(5))
    weight = build(kind, min_snr_gamma=1.0).loss_weight(t)
    assert torch.equal(weight, torch.ones(5))
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_the_published_formula(kind: str, gamma: float) -> None:
    paradigm = build(kind, weighting="min_snr", min_snr_gamma=gamma)
    t = paradigm.sample_t(torch.linspace(0.01, 0.98, 200, dtype=torch.float64))
    alpha, sigma = paradigm._alpha_sigma_float64(t)
    snr = (alpha / sigma) ** 2
    assert snr.min() < gamma < snr.max(), "both sides of the minimum"
    clipped = snr.clamp(max=gamma)
    expected = {"ddpm_eps": clipped / snr, "ddpm_v": clipped / (snr + 1), "flow": sigma**2 * clipped}[kind]
    weight = paradigm.loss_weight(t)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0.0)


def test_min_snr_weighs_an_error_of_the_clean_estimate_alike_whatever_the_network_predicts() -> None:
    """From one z0_hat, through the conversions, to each prediction: its weighted loss is min(SNR, gamma) |z0_hat - z0|^2."""
    gamma, abar = 5.0, schedules.scaled_linear_alphas_cumprod()
    z0, noise = latents(64)
    z0_hat = z0 + 0.3 * latents(64, seed=1)[0]
    index, time = torch.linspace(0, 999, 64).long(), torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
    losses = {}
    for paradigm, t, to_prediction in (
        (DDPMEps(abar, min_snr_gamma=gamma), index, paradigms.z0_to_eps),
        (DDPMV(abar, min_snr_gamma=gamma), index, paradigms.z0_to_v),
        (FlowOT(min_snr_gamma=gamma), time, paradigms.z0_to_velocity),
    ):
        zt = paradigm.add_noise(z0, noise, t)
        alpha, sigma = paradigm.alpha_sigma(t, like=z0)
        error_B = (to_prediction(z0_hat, zt, alpha, sigma) - paradigm.target(z0, noise, t)).square().flatten(1).mean(1)
        losses[type(paradigm)] = paradigm.loss_weight(t).double() * error_B
        snr_B = (alpha / sigma).square().flatten()
        expected = snr_B.clamp(max=gamma) * (z0_hat - z0).square().flatten(1).mean(1)
        torch.testing.assert_close(losses[type(paradigm)], expected, rtol=2e-7, atol=0.0)
    torch.testing.assert_close(losses[DDPMEps], losses[DDPMV], rtol=2e-7, atol=0.0)


def test_min_snr_is_finite_where_there_is_no_noise_and_where_there_is_nothing_else() -> None:
    v = build("ddpm_v", weighting="min_snr")
    assert v.noise_level(torch.tensor([999])).item() == math.inf
    assert v.loss_weight(torch.tensor([999])).item() == 0.0
    assert build("flow", weighting="min_snr").loss_weight(torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]
    for kind in ("ddpm_eps", "ddpm_v"):
        weight = build(kind, weighting="min_snr").loss_weight(torch.arange(999))
        assert (weight > 0).all()
        assert (weight <= 1).all()


def test_weights_stay_on_the_device_of_the_times() -> None:
    for kind, t in (("ddpm_eps", torch.tensor([5])), ("flow", torch.tensor([0.5]))):
        for weighting in ("uniform", "min_snr"):
            assert build(kind, weighting=weighting).loss_weight(t.to("meta")).device.type == "meta"


def test_each_kind_builds_its_paradigm() -> None:
    assert [type(build(kind)) for kind in KINDS] == [DDPMEps, DDPMV, FlowOT]
