"""DDPM with eps or v prediction and flow matching, in one convention: z_t = alpha_t z_0 + sigma_t eps, t = 0 is data.

Equation numbers are those of Berrada et al. (ICLR 2025); Table 1 gives alpha, sigma and the clean estimate.
Shapes: `latents_BCHW`; times `t_B` are int64 indices 0..T-1 for DDPM and floats in [0, 1] for flow.
Nothing here makes the host wait for the device.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.diffusion import schedules
from trainer.diffusion.schedules import NUM_TIMESTEPS, Density
from trainer.errors import UserError

# --------------------------------------------- conversions, given z_t; alpha and sigma broadcast against the latents


def z0_to_eps(z0: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (zt - alpha * z0) / sigma


def eps_to_z0(eps: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Table 1, DDPM-eps. Undefined at alpha = 0; large and finite at small alpha."""
    return (zt - sigma * eps) / alpha


def v_to_z0(v: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Table 1, DDPM-v, for v = alpha eps - sigma z0 and alpha**2 + sigma**2 = 1 (Salimans & Ho 2022)."""
    return alpha * zt - sigma * v


def v_to_eps(v: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sigma * zt + alpha * v


def z0_to_v(z0: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha * zt - z0) / sigma


def eps_to_v(eps: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (eps - sigma * zt) / alpha


def velocity_to_z0(velocity: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Table 1, Flow-OT, for velocity = eps - z0 and alpha + sigma = 1."""
    return zt - sigma * velocity


def velocity_to_eps(velocity: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return zt + alpha * velocity


def z0_to_velocity(z0: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (zt - z0) / sigma


def eps_to_velocity(eps: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (eps - zt) / alpha


# ------------------------------------------------------------------------------------------------------------ paradigms


@dataclass(frozen=True, eq=False, kw_only=True)
class Paradigm(ABC):
    """How latents become noisy, what the network predicts, and how noise levels are drawn and weighted in training.

    Latents keep their dtype, float32 at least: the coefficients are computed in float64 and rounded once.
    """

    density: Density = schedules.uniform_time
    """Of the training times, over [0, 1), before any shift."""
    min_snr_gamma: float | None = None
    """Of min-SNR weighting; None: each noise level's squared error counts alike."""

    @abstractmethod
    def sample_t(self, u_B: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1); monotone in u, so evenly spread u give evenly spread times."""

    @abstractmethod
    def centre_times(self, num_levels: int) -> Tensor:
        """The centres of equal parts of the diffusion's time (K,), from little noise to much: fixed noise levels to look at,
        whatever the training's density."""

    @abstractmethod
    def sampling_times(self, num_steps: int) -> list[int] | list[float]:
        """Times at which a sampler calls the network, from noise to data; the data's own time is not among them.

        Raises:
            UserError: the schedule has no so many steps.
        """

    @abstractmethod
    def model_time(self, t_B: Tensor) -> Tensor:
        """What the network's timestep embedding gets: float32 on a scale of 0 to 1000."""

    @abstractmethod
    def _alpha_sigma_float64(self, t_B: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def target(self, z0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network should predict."""

    @abstractmethod
    def to_z0(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean estimate z0_hat."""

    @abstractmethod
    def to_eps(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise that the prediction stands for."""

    def alpha_sigma(self, t_B: Tensor, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients (B,), float32; with `like`, in its precision and shaped to broadcast against it."""
        alpha_B, sigma_B = self._alpha_sigma_float64(t_B)
        if like is None:
            return alpha_B.float(), sigma_B.float()
        shape = (-1, *(1,) * (like.ndim - 1))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return alpha_B.to(dtype).view(shape), sigma_B.to(dtype).view(shape)

    def noise_level(self, t_B: Tensor) -> Tensor:
        """sigma/alpha (B,), float32; inf where alpha is 0."""
        alpha_B, sigma_B = self._alpha_sigma_float64(t_B)
        return (sigma_B / alpha_B).float()

    def loss_weight(self, t_B: Tensor) -> Tensor:
        """Factor on each sample's squared error of prediction (B,), float32 on t's device.

        With `min_snr_gamma`, the clean estimate's squared error weighs min(SNR, gamma) whatever the network predicts
        (Hang et al. 2023, section 3.4), SNR being (alpha/sigma)**2. That is min(SNR, gamma)/SNR on eps,
        min(SNR, gamma)/(SNR + 1) on v and sigma**2 min(SNR, gamma) on a velocity. Finite and without division by zero
        at either end: 0 where nothing but noise is left, and on v and velocity 0 where there is none.
        """
        if self.min_snr_gamma is None:
            return torch.ones(t_B.shape, dtype=torch.float32, device=t_B.device)
        alpha_B, sigma_B = self._alpha_sigma_float64(t_B)
        clean_weight_B = torch.minimum(alpha_B**2, self.min_snr_gamma * sigma_B**2)  # sigma**2 min(SNR, gamma)
        return self._weight_on_prediction(clean_weight_B, alpha_B).float()

    def _weight_on_prediction(self, clean_weight_B: Tensor, alpha_B: Tensor) -> Tensor:
        """From a weight on (error of z0_hat / sigma)**2 to one on the prediction's own squared error. The two are equal
        for v and velocity, by Table 1."""
        return clean_weight_B

    def add_noise(self, z0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t_B, like=z0_BCHW)
        return alpha * z0_BCHW + sigma * noise_BCHW


@dataclass(frozen=True, eq=False)
class DDPM(Paradigm):
    alphas_cumprod: np.ndarray = field(repr=False)
    """abar_t, float64 (T,)."""
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    """alpha and sigma over T on each device that asked: moved once, not each step."""

    def sample_t(self, u_B: Tensor) -> Tensor:
        num_timesteps = len(self.alphas_cumprod)
        # In float32 the product rounds some u up to the next index.
        return (self.density(u_B.double()) * num_timesteps).long().clamp(0, num_timesteps - 1)

    def centre_times(self, num_levels: int) -> Tensor:
        centres_K = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
        return (centres_K * len(self.alphas_cumprod)).long()

    def sampling_times(self, num_steps: int) -> list[int]:
        # "Trailing" (Lin et al. 2024, section 3.3): starts at T-1, the only step whose input is (nearly) pure noise.
        num_timesteps = len(self.alphas_cumprod)
        if not 1 <= num_steps <= num_timesteps:
            raise UserError(f"samples.num_steps: {num_steps} is not within 1 to {num_timesteps}, the schedule's length")
        return [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]

    def model_time(self, t_B: Tensor) -> Tensor:
        return t_B.float()

    def _alpha_sigma_float64(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        if t_B.device not in self._tables:
            alpha_T = torch.from_numpy(np.sqrt(self.alphas_cumprod))
            sigma_T = torch.from_numpy(np.sqrt(1.0 - self.alphas_cumprod))
            self._tables[t_B.device] = alpha_T.to(t_B.device), sigma_T.to(t_B.device)
        alpha_T, sigma_T = self._tables[t_B.device]
        return alpha_T[t_B], sigma_T[t_B]


@dataclass(frozen=True, eq=False)
class DDPMEps(DDPM):
    """The network predicts eps (Ho et al. 2020)."""

    def __post_init__(self) -> None:
        assert (self.alphas_cumprod > 0).all(), "eps says nothing of z0 where alpha is 0: use v with zero terminal SNR"

    def target(self, z0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return noise_BCHW

    def to_z0(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return eps_to_z0(pred_BCHW, zt_BCHW, *self.alpha_sigma(t_B, like=zt_BCHW))

    def to_eps(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return pred_BCHW

    def _weight_on_prediction(self, clean_weight_B: Tensor, alpha_B: Tensor) -> Tensor:
        return clean_weight_B / alpha_B**2


@dataclass(frozen=True, eq=False)
class DDPMV(DDPM):
    """The network predicts v = alpha eps - sigma z0 (Salimans & Ho 2022)."""

    def target(self, z0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t_B, like=z0_BCHW)
        return alpha * noise_BCHW - sigma * z0_BCHW

    def to_z0(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return v_to_z0(pred_BCHW, zt_BCHW, *self.alpha_sigma(t_B, like=zt_BCHW))

    def to_eps(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return v_to_eps(pred_BCHW, zt_BCHW, *self.alpha_sigma(t_B, like=zt_BCHW))


@dataclass(frozen=True, eq=False)
class FlowOT(Paradigm):
    """The network predicts the velocity eps - z0 of the straight path alpha = 1 - t, sigma = t (Lipman et al. 2023)."""

    shift_ratio: float = 1.0
    """Factor on t/(1-t), of training and of sampling times."""

    def sample_t(self, u_B: Tensor) -> Tensor:
        t_B = schedules.shift_time(self.density(u_B.double()), self.shift_ratio)
        return t_B.clamp(0.0, 1.0).to(torch.promote_types(u_B.dtype, torch.float32))

    def centre_times(self, num_levels: int) -> Tensor:
        return (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels

    def sampling_times(self, num_steps: int) -> list[float]:
        if num_steps < 1:
            raise UserError(f"samples.num_steps: {num_steps} is not positive; 25 to 50 are usual")
        t = 1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps
        times: list[float] = schedules.shift_time(t, self.shift_ratio).tolist()
        return times

    def model_time(self, t_B: Tensor) -> Tensor:
        return (t_B * NUM_TIMESTEPS).float()

    def _alpha_sigma_float64(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t_B.double(), t_B.double()

    def target(self, z0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return noise_BCHW - z0_BCHW

    def to_z0(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return velocity_to_z0(pred_BCHW, zt_BCHW, *self.alpha_sigma(t_B, like=zt_BCHW))

    def to_eps(self, pred_BCHW: Tensor, zt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return velocity_to_eps(pred_BCHW, zt_BCHW, *self.alpha_sigma(t_B, like=zt_BCHW))


def build_paradigm(config: ParadigmConfig, *, resolution: int) -> Paradigm:
    """The paradigm at a resolution (side of the images, in pixels), noise levels shifted where the config says so."""
    ratio = resolution / config.shift_base_px if config.shift_base_px else 1.0
    density = _density(config)
    gamma = config.min_snr_gamma if config.weighting == "min_snr" else None
    if config.kind == "flow":
        return FlowOT(shift_ratio=ratio, density=density, min_snr_gamma=gamma)
    alphas_cumprod = schedules.scaled_linear_alphas_cumprod()
    if config.kind == "ddpm_eps":
        shifted = schedules.shift_alphas_cumprod(alphas_cumprod, ratio)
        return DDPMEps(shifted, density=density, min_snr_gamma=gamma)
    shifted = schedules.shift_alphas_cumprod(schedules.zero_terminal_snr(alphas_cumprod), ratio)
    return DDPMV(shifted, density=density, min_snr_gamma=gamma)


def _density(config: ParadigmConfig) -> Density:
    """Which density goes with which paradigm, the config has checked."""
    match config.timestep_density or ("mode" if config.kind == "flow" else "uniform"):
        case "uniform":
            return schedules.uniform_time
        case "logit_normal":
            return partial(schedules.logit_normal_time, mean=config.logit_mean, std=config.logit_std)
        case "cosmap":
            return schedules.cosmap_time
        case "mode":
            return partial(schedules.mode_time, scale=config.mode_scale)
