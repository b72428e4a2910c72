"""Deterministic samplers from noise to latents.

A sampler calls `predict(zt_BCHW, t) -> prediction_BCHW`, t on the host, and, rk4_38 excepted, never makes the host wait for
the device. `ddim` is for DDPM; `euler`, `heun` and the two of Runge and Kutta solve the flow's dz/dt = velocity, with an
error that falls as 1/N, 1/N**2 and 1/N**4 in the number of steps N; `dpm_solver` is for both: of second order on flow, on
DDPM of first with a smaller error than `ddim`'s, as trailing times end before 0 and the last step goes to z0_hat.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from trainer.diffusion.guidance import Guidance, Predict, guided, times
from trainer.diffusion.paradigms import FlowOT, Paradigm
from trainer.errors import UserError


class Sampler(Protocol):
    def __call__(self, predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor: ...


@torch.no_grad()
def ddim(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 with zero variance); returns z0.

    Each step goes to alpha_s z0_hat + sigma_s eps_hat; the last one to z0_hat itself.
    """
    z_BCHW = noise_BCHW
    steps = paradigm.sampling_times(num_steps)
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        t_B, pred_BCHW = times(t, z_BCHW), predict(z_BCHW, t)
        z0_BCHW = paradigm.to_z0(pred_BCHW, z_BCHW, t_B)
        if s is None:
            return z0_BCHW
        eps_BCHW = paradigm.to_eps(pred_BCHW, z_BCHW, t_B)
        z_BCHW = paradigm.add_noise(z0_BCHW, eps_BCHW, times(s, z_BCHW))
    raise AssertionError("sampling times are never empty")


@torch.no_grad()
def dpm_solver(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), in the clean estimate and lambda = log(alpha/sigma); returns z0.

    A step from t to s with h = lambda_s - lambda_t goes to sigma_s/sigma_t z + alpha_s (1 - exp(-h)) D, where D continues
    the line through this step's clean estimate and the one before. The last step, to sigma = 0, goes to z0_hat itself, as in
    diffusers' `DPMSolverMultistepScheduler`. exp(-h) is formed without logarithms, so pure noise (alpha = 0) is as good a
    start as any: nothing is extrapolated from there, for lambda is infinitely far away.
    """
    z_BCHW = noise_BCHW
    before_BCHW: Tensor | None = None
    h_before = torch.zeros(())
    steps = paradigm.sampling_times(num_steps)
    levels = [_level(paradigm, t) for t in steps]
    for i, t in enumerate(steps):
        z0_BCHW = paradigm.to_z0(predict(z_BCHW, t), z_BCHW, times(t, z_BCHW))
        if i == num_steps - 1:
            return z0_BCHW
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        exp_minus_h = alpha_t * sigma_s / (sigma_t * alpha_s)
        h = -exp_minus_h.log()
        slope_BCHW = z0_BCHW
        if before_BCHW is not None:
            slope_BCHW = z0_BCHW + float(0.5 * h / h_before) * (z0_BCHW - before_BCHW)
        z_BCHW = float(sigma_s / sigma_t) * z_BCHW + float(alpha_s * (1.0 - exp_minus_h)) * slope_BCHW
        before_BCHW, h_before = z0_BCHW, h
    raise AssertionError("sampling times are never empty")


def _level(paradigm: Paradigm, t: float) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a time, float64 on the host."""
    alpha_1, sigma_1 = paradigm.alpha_sigma(times(t, torch.zeros(1, dtype=torch.float64)), like=torch.zeros(1).double())
    return alpha_1[0], sigma_1[0]


@torch.no_grad()
def euler(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Euler steps on dz/dt = velocity from t = 1 to t = 0; returns z0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in pairwise(_flow_times("euler", paradigm, num_steps)):
        z_BCHW = z_BCHW + (s - t) * predict(z_BCHW, t)
    return z_BCHW


@torch.no_grad()
def heun(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Heun steps (Karras et al. 2022, algorithm 1, on flow's velocity); returns z0.

    The last is an Euler step, as in diffusers' `FlowMatchHeunDiscreteScheduler`: the network never sees t = 0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in pairwise(_flow_times("heun", paradigm, num_steps)):
        slope_BCHW = predict(z_BCHW, t)
        if s > 0.0:
            ahead_BCHW = z_BCHW + (s - t) * slope_BCHW
            slope_BCHW = 0.5 * (slope_BCHW + predict(ahead_BCHW, s))
        z_BCHW = z_BCHW + (s - t) * slope_BCHW
    return z_BCHW


@torch.no_grad()
def rk4(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Steps of the classic fourth-order Runge-Kutta tableau; returns z0. Its last call of the network is at t = 0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in pairwise(_flow_times("rk4", paradigm, num_steps)):
        h, middle = s - t, (t + s) / 2
        k1_BCHW = predict(z_BCHW, t)
        k2_BCHW = predict(z_BCHW + h / 2 * k1_BCHW, middle)
        k3_BCHW = predict(z_BCHW + h / 2 * k2_BCHW, middle)
        k4_BCHW = predict(z_BCHW + h * k3_BCHW, s)
        z_BCHW = z_BCHW + h / 6 * (k1_BCHW + 2 * k2_BCHW + 2 * k3_BCHW + k4_BCHW)
    return z_BCHW


@torch.no_grad()
def rk4_38(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """`torchdiffeq.odeint(method="rk4")` on a fixed grid, as the paper draws: Kutta's 3/8 rule; returns z0. Its last call of
    the network is at t = 0. torchdiffeq keeps times on the device, so the host waits for it at each call.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    from torchdiffeq import odeint

    # each step by itself: odeint keeps the solution at every time that it is given
    z_BCHW = noise_BCHW
    for t, s in pairwise(_flow_times("rk4-38", paradigm, num_steps)):
        ends_2 = torch.tensor([t, s], dtype=torch.float64, device=z_BCHW.device)
        z_BCHW = odeint(lambda t, z: predict(z, float(t)), z_BCHW, ends_2, method="rk4")[-1]
    return z_BCHW


def _flow_times(name: str, paradigm: Paradigm, num_steps: int) -> list[float]:
    """Of all steps' ends, t = 1 to t = 0."""
    if not isinstance(paradigm, FlowOT):
        raise UserError(f"samples.sampler: {name} goes with flow, this is {type(paradigm).__name__}; use ddim")
    return [*paradigm.sampling_times(num_steps), 0.0]


_SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim, "dpm-solver": dpm_solver, "euler": euler, "heun": heun, "rk4": rk4, "rk4-38": rk4_38,
}  # fmt: skip


def build_sampler(name: str) -> Sampler:
    """The sampler of a name in `trainer.config.sampling.SAMPLERS`."""
    return _SAMPLERS[name]


@dataclass(frozen=True)
class Evaluations:
    """What one picture costs."""

    calls: int
    """Evaluations of the prediction, which is the number of function evaluations (NFE) of the literature."""
    passes: int
    """Samples through the network: an evaluation with guidance takes two."""


def evaluations(name: str, paradigm: Paradigm, num_steps: int, guidance: Guidance | None = None) -> Evaluations:
    """Counted by going the sampler's way with one number in the latents' place."""
    calls, passes = 0, 0

    def model(zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        nonlocal calls, passes
        calls, passes = calls + 1, passes + len(zt_BCHW)
        return zt_BCHW

    build_sampler(name)(guided(model, guidance or Guidance()), paradigm, torch.zeros(1, 1, 1, 1), num_steps)
    return Evaluations(calls, passes)
