"""Samplers on Gaussian data, where the best prediction and the path of the flow are known in closed form."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.diffusion.paradigms import DDPMV, Paradigm, build_paradigm
from trainer.diffusion.samplers import Predict, build_sampler, ddim, euler, guided
from trainer.errors import UserError

MEAN, STD = 0.7, 0.4
"""The data: each value N(MEAN, STD**2)."""


def build(kind, **options) -> Paradigm:
    return build_paradigm(ParadigmConfig(kind=kind, **options), resolution=512)


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
    z = sampler(partial(exact_prediction, paradigm), paradigm, noise(), num_steps)
    return float((z - exact_z0(paradigm, noise())).abs().max())


def order(errors: dict[int, float]) -> float:
    """Slope of log error over log step size, by least squares."""
    x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (errors, errors.values()))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


@pytest.mark.parametrize("shift_base_px", [None, 256])
def test_euler_is_of_first_order(shift_base_px: int | None) -> None:
    paradigm = build("flow", shift_base_px=shift_base_px)
    errors = {n: error(euler, paradigm, n) for n in (50, 100, 200, 400)}
    assert order(errors) == pytest.approx(1.0, abs=0.05), errors
    assert errors[400] < 1e-2


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
        ddim(predict, paradigm, noise(), 1), paradigm.to_z0(predict(noise(), t), noise(), t), rtol=1e-12, atol=0.0
    )


def test_ddim_on_flow_is_euler() -> None:
    """Both walk straight to the next time, by two formulas."""
    paradigm = build("flow")
    predict = partial(exact_prediction, paradigm)
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
        sampler = euler if kind == "flow" else ddim
        z = sampler(predict, paradigm, noise(), num_steps)
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


def test_euler_needs_a_velocity() -> None:
    with pytest.raises(UserError, match=r"samples\.sampler: euler goes with flow, this is DDPMV; use ddim"):
        euler(lambda z, t: z, build("ddpm_v"), noise(), 2)


@pytest.mark.parametrize(("kind", "name"), [("ddpm_v", "ddim"), ("flow", "euler")])
def test_samplers_keep_dtype_and_call_the_network_once_a_step_without_gradient(kind: str, name: str) -> None:
    calls: list[Tensor] = []

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert t.shape == (2,)
        assert zt.dtype == torch.float32
        calls.append(t)
        return zt

    z = build_sampler(name)(predict, build(kind), noise(torch.float32), 6)
    assert z.dtype == torch.float32
    assert len(calls) == 6


def predict_label(scale: float, calls: list[int]) -> Predict:
    """A network whose first half is told 3 and whose second half is told nothing."""

    def model(zt: Tensor, t: Tensor) -> Tensor:
        calls.append(len(zt))
        half = len(zt) // 2
        assert torch.equal(zt[:half], zt[half:])
        assert torch.equal(t[:half], t[half:])
        label = torch.cat([torch.full((half,), 3.0), torch.zeros(half)]).view(-1, 1, 1, 1)
        return zt + label

    return guided(model, scale)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (1.0, 3.0), (2.0, 6.0), (7.5, 22.5)])
def test_guidance_extrapolates_in_one_call_of_twice_the_batch(scale: float, shift: float) -> None:
    calls: list[int] = []
    z = noise(torch.float32)
    out = predict_label(scale, calls)(z, torch.zeros(2))
    torch.testing.assert_close(out, z + shift)
    assert calls == [4]
