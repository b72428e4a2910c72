"""Samplers on Gaussian data, where the best prediction and the path of the flow are known in closed form."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.config.sampling import SAMPLERS
from trainer.diffusion.guidance import Predict, times
from trainer.diffusion.paradigms import DDPMV, FlowOT, Paradigm, build_paradigm
from trainer.diffusion.samplers import (
    Evaluations,
    build_sampler,
    ddim,
    dpm_solver,
    euler,
    evaluations,
    heun,
    rk4,
    rk4_38,
)
from trainer.errors import UserError

MEAN, STD = 0.7, 0.4
"""The data: each value N(MEAN, STD**2)."""


def build(kind, **options) -> Paradigm:
    return build_paradigm(ParadigmConfig(kind=kind, **options), resolution=512)


def on_host(model: Callable[[Tensor, Tensor], Tensor]) -> Predict:
    """What a sampler calls, of what takes times (B,)."""
    return lambda zt, t: model(zt, times(t, zt))


def exact_prediction(paradigm: Paradigm, zt: Tensor, t: Tensor) -> Tensor:
    """The posterior means of z0 and eps under Gaussian data, as the paradigm's prediction (a linear target)."""
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in paradigm._alpha_sigma_float64(t))
    total = alpha**2 * STD**2 + sigma**2
    z0 = MEAN + alpha * STD**2 / total * (zt - alpha * MEAN)
    eps = sigma / total * (zt - alpha * MEAN)
    return paradigm.target(z0, eps, t)


def exact_z0(paradigm: Paradigm, noise: Tensor) -> Tensor:
    """Where the probability flow carries the noise: standardised values stay the same along the path."""
    t = paradigm.sampling_times(1)[0]
    alpha, sigma = paradigm._alpha_sigma_float64(torch.tensor([t]))
    return MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def error(sampler, paradigm: Paradigm, num_steps: int) -> float:
    z = sampler(on_host(partial(exact_prediction, paradigm)), paradigm, noise(), num_steps)
    return float((z - exact_z0(paradigm, noise())).abs().max())


def order(errors: dict[int, float]) -> float:
    """Slope of log error over log step size, by least squares."""
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (errors, errors.values()))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


@pytest.mark.parametrize("shift_base_px", [None, 256])
@pytest.mark.parametrize(
    ("name", "of_order", "steps", "last_error"),
    [
        ("euler", 1, (50, 100, 200, 400), 1e-2),
        ("heun", 2, (50, 100, 200, 400), 1e-4),
        ("rk4", 4, (160, 320, 640), 1e-10),
        ("rk4-38", 4, (160, 320, 640), 1e-10),
    ],
)
def test_order_of_the_flow_samplers(
    name: str, of_order: int, steps: tuple[int, ...], last_error: float, shift_base_px: int | None
) -> None:
    """The error falls as h, h**2 and h**4."""
    paradigm = build("flow", shift_base_px=shift_base_px)
    errors = {n: error(build_sampler(name), paradigm, n) for n in steps}
    assert order(errors) == pytest.approx(of_order, rel=0.05), errors
    assert errors[steps[-1]] < last_error


def test_at_equal_cost_the_higher_order_is_nearer() -> None:
    paradigm, errors = build("flow"), {}
    for name, num_steps in (("euler", 40), ("heun", 20), ("rk4", 10), ("rk4-38", 10)):
        assert evaluations(name, paradigm, num_steps).calls <= 40
        errors[name] = error(build_sampler(name), paradigm, num_steps)
    assert errors["rk4-38"] < errors["rk4"] < errors["heun"] < errors["euler"], "the 3/8 rule's error is the smaller"


def test_ddim_is_of_first_order_in_the_angle() -> None:
    """DDIM turns (z0, eps) by the angle whose cosine is alpha: on a schedule even in it, the error falls as 1/N."""
    paradigm = DDPMV(np.cos(np.arange(1, 1001) / 1000 * math.pi / 2) ** 2)
    errors = {n: error(ddim, paradigm, n) for n in (20, 50, 100, 250)}
    assert order(errors) == pytest.approx(1.0, abs=0.05), errors
    assert errors[250] < 1e-2


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v"])
def test_ddim_converges_as_log_n_over_n(kind: str) -> None:
    """Even steps in t shrink in the angle as sqrt(k+1) - sqrt(k) towards the data, and their squares sum to log N."""
    paradigm = build(kind)
    times_n = [n * error(ddim, paradigm, n) for n in (10, 50, 250)]
    growth, growth_after = times_n[1] - times_n[0], times_n[2] - times_n[1]
    assert 0 < growth_after == pytest.approx(growth, rel=0.15), times_n
    assert times_n[2] < 10


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v"])
def test_ddim_of_one_step_is_the_clean_estimate(kind: str) -> None:
    paradigm, t = build(kind), torch.tensor([999, 999])
    predict = partial(exact_prediction, paradigm)
    torch.testing.assert_close(
        ddim(on_host(predict), paradigm, noise(), 1),
        paradigm.to_z0(predict(noise(), t), noise(), t),
        rtol=1e-12,
        atol=0.0,
    )


def test_ddim_on_flow_is_euler() -> None:
    """Both walk straight to the next time, by two formulas."""
    paradigm = build("flow")
    predict = on_host(partial(exact_prediction, paradigm))
    torch.testing.assert_close(
        ddim(predict, paradigm, noise(), 7), euler(predict, paradigm, noise(), 7), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["ddpm_eps", "ddpm_v", "flow"])
def test_a_single_point_of_data_is_reached_at_any_number_of_steps(kind: str) -> None:
    paradigm = build(kind)
    point = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in paradigm._alpha_sigma_float64(t))
        return paradigm.target(point, (zt - alpha * point) / sigma, t)

    for num_steps in (1, 2, 7, 50):
        # rk4 asks at t = 0, where this predict divides by 0
        for sampler in (euler, heun, dpm_solver) if kind == "flow" else (ddim, dpm_solver):
            z = sampler(on_host(predict), paradigm, noise(), num_steps)
            torch.testing.assert_close(z, point, rtol=0, atol=1e-10)


def test_ddpm_times_are_trailing() -> None:
    paradigm = build("ddpm_v")
    assert paradigm.sampling_times(5) == [999, 799, 599, 399, 199]
    assert paradigm.sampling_times(1) == [999]
    assert paradigm.sampling_times(1000) == list(range(999, -1, -1))
    for n in (3, 7, 28, 600, 800, 999):
        times = paradigm.sampling_times(n)
        assert times[0] == 999
        assert len(set(times)) == n
        assert times == sorted(times, reverse=True)
        assert times[-1] >= 0


def test_flow_times_are_shifted_as_in_training() -> None:
    assert build("flow").sampling_times(4) == [1.0, 0.75, 0.5, 0.25]
    shifted = build("flow", shift_base_px=256).sampling_times(4)
    assert shifted == pytest.approx([1.0, 6 / 7, 2 / 3, 0.4])


@pytest.mark.parametrize(("kind", "num_steps"), [("ddpm_eps", 0), ("ddpm_eps", 1001), ("flow", 0)])
def test_impossible_step_counts(kind: str, num_steps: int) -> None:
    with pytest.raises(UserError, match=r"samples\.num_steps: \d+ is not"):
        build(kind).sampling_times(num_steps)


@pytest.mark.parametrize("name", ["euler", "heun", "rk4", "rk4-38"])
def test_flow_samplers_need_a_velocity(name: str) -> None:
    with pytest.raises(UserError, match=rf"samples\.sampler: {name} goes with flow, this is DDPMV; use ddim"):
        build_sampler(name)(lambda z, t: z, build("ddpm_v"), noise(), 2)


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize(("kind", "name", "calls_of_6"), [
    ("ddpm_v", "ddim", 6), ("flow", "euler", 6), ("flow", "heun", 11), ("flow", "rk4", 24), ("flow", "rk4-38", 24),
    ("flow", "dpm-solver", 6), ("ddpm_eps", "dpm-solver", 6),
])  # fmt: skip
def test_samplers_keep_dtype_and_call_the_network_as_often_as_said(
    kind: str, name: str, calls_of_6: int, num_steps: int
) -> None:
    calls: list[float] = []

    def predict(zt: Tensor, t: float) -> Tensor:
        assert not torch.is_grad_enabled()
        assert zt.dtype == torch.float32
        calls.append(t)
        return zt

    paradigm = build(kind)
    z = build_sampler(name)(predict, paradigm, noise(torch.float32), num_steps)
    assert z.dtype == torch.float32
    assert {type(t) for t in calls} == {float if kind == "flow" else int}
    assert evaluations(name, paradigm, num_steps) == Evaluations(len(calls), len(calls))
    assert evaluations(name, paradigm, 6).calls == calls_of_6
    assert calls == sorted(calls, reverse=True)
    assert (calls[-1] == 0.0) == name.startswith("rk4"), "the others never ask at t = 0"


def test_every_name_is_a_sampler() -> None:
    assert len({build_sampler(name) for name in SAMPLERS}) == len(SAMPLERS)


# -------------------------------------------------------------------------------------------- diffusers' own schedulers


def network(zt: Tensor, time: Tensor) -> Tensor:
    """Any network: it mixes channels, and time (0 to 1000) matters."""
    return torch.tanh(0.7 * zt.roll(1, 1) - 0.4 * zt + time.float().view(-1, 1, 1, 1) / 500 - 1.0)


def ours(name: str, paradigm: Paradigm, num_steps: int) -> Tensor:
    predict = on_host(lambda zt, t: network(zt, paradigm.model_time(t)))
    return build_sampler(name)(predict, paradigm, noise(torch.float32), num_steps)


def theirs(scheduler, model_time_of_timestep: float = 1.0) -> Tensor:
    z = noise(torch.float32)
    for t in scheduler.timesteps:
        prediction = network(z, (t * model_time_of_timestep).expand(len(z)))
        z = scheduler.step(prediction, t, z).prev_sample
    return z


@pytest.mark.parametrize("num_steps", [1, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_euler_is_diffusers_euler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist())  # as FLUX's pipeline does
    paradigm = build("flow", shift_base_px=int(512 / shift))
    torch.testing.assert_close(ours("euler", paradigm, num_steps), theirs(scheduler), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 7, 28])
def test_heun_is_diffusers_heun(num_steps: int) -> None:
    """Its times end at 1/num_train_timesteps; with as many of these as steps they are ours."""
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=num_steps)
    scheduler.set_timesteps(num_steps)
    expected = theirs(scheduler, model_time_of_timestep=1000 / num_steps)
    torch.testing.assert_close(ours("heun", build("flow"), num_steps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 10, 50])
@pytest.mark.parametrize(("kind", "prediction_type"), [("ddpm_eps", "epsilon"), ("ddpm_v", "v_prediction")])
def test_ddim_is_diffusers_ddim_with_trailing_times(kind: str, prediction_type: str, num_steps: int) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=kind == "ddpm_v",
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(ours("ddim", build(kind), num_steps), theirs(scheduler), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize(("kind", "prediction_type"), [("ddpm_eps", "epsilon"), ("ddpm_v", "v_prediction")])
def test_dpm_solver_is_diffusers_with_trailing_times(kind: str, prediction_type: str, num_steps: int) -> None:
    """With zero terminal SNR theirs begins at alpha**2 = 2**-24 in place of 0: with that they agree, and the exact 0 is as
    near as alpha is."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        timestep_spacing="trailing", rescale_betas_zero_snr=kind == "ddpm_v",
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    expected, paradigm = theirs(scheduler), build(kind)
    torch.testing.assert_close(ours("dpm-solver", paradigm, num_steps), expected, rtol=0, atol=3e-3)
    if isinstance(paradigm, DDPMV):
        assert paradigm.alphas_cumprod[-1] == 0.0
        paradigm = DDPMV(np.maximum(paradigm.alphas_cumprod, 2.0**-24))
    torch.testing.assert_close(ours("dpm-solver", paradigm, num_steps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_dpm_solver_is_diffusers_with_flow_sigmas(num_steps: int, shift: float) -> None:
    """Their times run from 1 - 1/num_train_timesteps; ours, on the same times, agree."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    scheduler.set_timesteps(num_steps)
    paradigm = build("flow", shift_base_px=int(512 / shift))
    assert isinstance(paradigm, FlowOT)
    sigmas = scheduler.sigmas[:-1].double().tolist()
    assert paradigm.sampling_times(num_steps) == pytest.approx(sigmas, abs=2e-3)
    object.__setattr__(paradigm, "sampling_times", lambda num_steps: sigmas)
    # what their network is told is cut to a whole number, so it is told the sigma itself
    z = noise(torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(network(z, torch.full((len(z),), 1000 * sigmas[i])), t, z).prev_sample
    torch.testing.assert_close(ours("dpm-solver", paradigm, num_steps), z, rtol=1e-4, atol=1e-4)


def test_dpm_solver_is_of_second_order_in_the_log_snr() -> None:
    """On a schedule even in lambda = log(alpha/sigma), up to where a clean estimate is the end of the path."""
    paradigm = DDPMV(torch.sigmoid(2 * torch.linspace(8.0, -3.0, 1000, dtype=torch.float64)).numpy())
    errors = {n: error(dpm_solver, paradigm, n) for n in (25, 50, 100, 200)}
    assert order(errors) == pytest.approx(2.0, abs=0.05), errors
    assert errors[50] < error(ddim, paradigm, 500), "a tenth of the steps of the first order"


def test_the_two_rules_of_fourth_order_differ() -> None:
    """torchdiffeq's rk4 is Kutta's 3/8 rule, here once by its tableau, and not the classic one."""
    paradigm, z, h = build("flow"), noise(), -1.0
    f = on_host(partial(exact_prediction, paradigm))
    k1 = f(z, 1.0)
    k2 = f(z + h * k1 / 3, 1 - 1 / 3)
    k3 = f(z + h * (k2 - k1 / 3), 1 - 2 / 3)
    k4 = f(z + h * (k1 - k2 + k3), 0.0)
    kutta = z + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    torch.testing.assert_close(rk4_38(f, paradigm, z, 1), kutta, rtol=1e-12, atol=1e-12)
    assert (rk4(f, paradigm, z, 1) - kutta).abs().max() > 1e-3
