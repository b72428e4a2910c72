"""Deterministic samplers from noise to latents, and classifier-free guidance.

A sampler calls `predict(zt_BCHW, t_B) -> prediction_BCHW` and never makes the host wait for the device. `ddim` is for
DDPM; `euler`, `heun` and `rk4` solve the flow's dz/dt = velocity, with an error that falls as 1/N, 1/N**2 and 1/N**4 in the
number of steps N. `evaluations` says how often each calls the network.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from trainer.diffusion.paradigms import FlowOT, Paradigm
from trainer.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]


class Sampler(Protocol):
    def __call__(self, predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor: ...


@torch.no_grad()
def ddim(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 with zero variance); returns z0.

    Each step goes to alpha_s z0_hat + sigma_s eps_hat; the last one to z0_hat itself.
    """
    z_BCHW = noise_BCHW
    times = paradigm.sampling_times(num_steps)
    for t, s in zip(times, [*times[1:], None], strict=True):
        t_B = _times(t, z_BCHW)
        pred_BCHW = predict(z_BCHW, t_B)
        z0_BCHW = paradigm.to_z0(pred_BCHW, z_BCHW, t_B)
        if s is None:
            return z0_BCHW
        eps_BCHW = paradigm.to_eps(pred_BCHW, z_BCHW, t_B)
        z_BCHW = paradigm.add_noise(z0_BCHW, eps_BCHW, _times(s, z_BCHW))
    raise AssertionError("sampling times are never empty")


@torch.no_grad()
def euler(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Euler steps on dz/dt = velocity from t = 1 to t = 0; returns z0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in _flow_steps("euler", paradigm, num_steps):
        z_BCHW = z_BCHW + (s - t) * predict(z_BCHW, _times(t, z_BCHW))
    return z_BCHW


@torch.no_grad()
def heun(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Heun steps (Karras et al. 2022, algorithm 1, on flow's velocity); returns z0.

    The last is an Euler step, as in diffusers' `FlowMatchHeunDiscreteScheduler`: the network never sees t = 0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in _flow_steps("heun", paradigm, num_steps):
        slope_BCHW = predict(z_BCHW, _times(t, z_BCHW))
        if s > 0.0:
            ahead_BCHW = z_BCHW + (s - t) * slope_BCHW
            slope_BCHW = 0.5 * (slope_BCHW + predict(ahead_BCHW, _times(s, z_BCHW)))
        z_BCHW = z_BCHW + (s - t) * slope_BCHW
    return z_BCHW


@torch.no_grad()
def rk4(predict: Predict, paradigm: Paradigm, noise_BCHW: Tensor, num_steps: int) -> Tensor:
    """Steps of the classic fourth-order Runge-Kutta tableau; returns z0. Its last call of the network is at t = 0.

    Raises:
        UserError: the paradigm does not predict a velocity.
    """
    z_BCHW = noise_BCHW
    for t, s in _flow_steps("rk4", paradigm, num_steps):
        h, middle_B = s - t, _times((t + s) / 2, z_BCHW)
        k1_BCHW = predict(z_BCHW, _times(t, z_BCHW))
        k2_BCHW = predict(z_BCHW + h / 2 * k1_BCHW, middle_B)
        k3_BCHW = predict(z_BCHW + h / 2 * k2_BCHW, middle_B)
        k4_BCHW = predict(z_BCHW + h * k3_BCHW, _times(s, z_BCHW))
        z_BCHW = z_BCHW + h / 6 * (k1_BCHW + 2 * k2_BCHW + 2 * k3_BCHW + k4_BCHW)
    return z_BCHW


def _flow_steps(name: str, paradigm: Paradigm, num_steps: int) -> list[tuple[float, float]]:
    """(from, to) of each step, t = 1 to t = 0."""
    if not isinstance(paradigm, FlowOT):
        raise UserError(f"samples.sampler: {name} goes with flow, this is {type(paradigm).__name__}; use ddim")
    return list(pairwise([*paradigm.sampling_times(num_steps), 0.0]))


def _times(t: float, like_BCHW: Tensor) -> Tensor:
    dtype = torch.int64 if isinstance(t, int) else torch.promote_types(like_BCHW.dtype, torch.float32)
    return torch.full((like_BCHW.shape[0],), t, dtype=dtype, device=like_BCHW.device)


def guided(model: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2021): uncond + scale * (cond - uncond), in one call of 2B samples.

    `model` gets the latents and times twice and must condition its first B samples and not its last B.
    """

    def predict(zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        cond_BCHW, uncond_BCHW = model(torch.cat([zt_BCHW, zt_BCHW]), torch.cat([t_B, t_B])).chunk(2)
        return uncond_BCHW + scale * (cond_BCHW - uncond_BCHW)

    return predict


def build_sampler(name: str) -> Sampler:
    """The sampler that `SamplesConfig.sampler` names."""
    return {"ddim": ddim, "euler": euler, "heun": heun, "rk4": rk4}[name]


def evaluations(name: str, num_steps: int) -> int:
    """Calls of the network that a sampler makes. With guidance each is of twice the batch."""
    return {"ddim": num_steps, "euler": num_steps, "heun": 2 * num_steps - 1, "rk4": 4 * num_steps}[name]
