"""Classifier-free guidance, where and how far it is applied.

A model is called with latents and times of B samples, all with their condition; or of 2B, of which the first B have theirs
and the last B, the same latents again, have none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.schedules import NUM_TIMESTEPS

Model = Callable[[Tensor, Tensor], Tensor]
"""(latents, times (B,) or (2B,) on the device) -> prediction."""
Predict = Callable[[Tensor, float], Tensor]
"""(latents, time on the host: an index of DDPM, as an int, or flow's t) -> prediction. What a sampler calls."""


@dataclass(frozen=True)
class Guidance:
    scale: float = 1.0
    """1: the conditional prediction alone, in calls of B samples."""
    interval: tuple[float, float] | None = None
    """Shares of the diffusion's time, 0 data and 1 noise, between which it is applied, both included; None: always."""
    rescale: float = 0.0
    """phi of Lin et al. 2024."""

    def applies(self, t: float) -> bool:
        """At a sampler's time."""
        if self.scale == 1.0 or self.interval is None:
            return self.scale != 1.0
        first, last = self.interval
        return first <= share_of_time(t) <= last


def share_of_time(t: float) -> float:
    """Of a sampler's time: 0 is data, 1 noise."""
    return t / NUM_TIMESTEPS if isinstance(t, int) else t


def times(t: float, like_BCHW: Tensor) -> Tensor:
    """A sampler's time for each sample (B,), on the device, without a wait for it."""
    dtype = torch.int64 if isinstance(t, int) else torch.promote_types(like_BCHW.dtype, torch.float32)
    return torch.full((like_BCHW.shape[0],), t, dtype=dtype, device=like_BCHW.device)


def guided(model: Model, guidance: Guidance) -> Predict:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2021), in one call of 2B samples; outside of the interval the
    conditional prediction, in one of B (Kynkaanniemi et al. 2024, eq. 3)."""

    def predict(zt_BCHW: Tensor, t: float) -> Tensor:
        if not guidance.applies(t):
            return model(zt_BCHW, times(t, zt_BCHW))
        both = torch.cat([zt_BCHW, zt_BCHW])
        cond_BCHW, uncond_BCHW = model(both, times(t, both)).chunk(2)
        guided_BCHW = uncond_BCHW + guidance.scale * (cond_BCHW - uncond_BCHW)
        return rescaled(guided_BCHW, cond_BCHW, guidance.rescale) if guidance.rescale else guided_BCHW

    return predict


def rescaled(guided_BCHW: Tensor, cond_BCHW: Tensor, phi: float) -> Tensor:
    """A share `phi` of the guided prediction with the conditional one's deviation over each sample, the rest as it is (Lin
    et al. 2024, eq. 15 and 16). A prediction that is the same everywhere has none, and stays."""
    std_B111, guided_std_B111 = (x.std(dim=(1, 2, 3), keepdim=True) for x in (cond_BCHW, guided_BCHW))
    ratio_B111 = torch.where(guided_std_B111 > 0, std_B111 / guided_std_B111, 1.0)
    return guided_BCHW * (phi * ratio_B111 + (1.0 - phi))
