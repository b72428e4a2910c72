"""From noise and a network to latents: what sampling in training and by `loupe sample` share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.diffusion.guidance import Guidance, Model, guided
from trainer.diffusion.paradigms import Paradigm
from trainer.diffusion.samplers import Evaluations, build_sampler, evaluations
from trainer.rng import normal
from trainer.sampling.settings import SampleSettings


def guidance_of(settings: SampleSettings) -> Guidance:
    return Guidance(settings.guidance, settings.guidance_interval, settings.guidance_rescale)


def noise_of(settings: SampleSettings, positions: Sequence[int], channels: int, downsampling: int) -> Tensor:
    """(B, C, h, w) float32 on the CPU: of seed and position alone, the same on every machine."""
    height, width = (side // downsampling for side in settings.size)
    return normal(settings.seed, positions, "sample", (channels, height, width), device=torch.device("cpu"))


def draw_latents(model: Model, paradigm: Paradigm, noise_BCHW: Tensor, settings: SampleSettings) -> Tensor:
    """Latents (B, C, h, w), float32 on the noise's device. `model`: as `guided` takes it."""
    sampler = build_sampler(settings.sampler)
    return sampler(guided(model, guidance_of(settings)), paradigm, noise_BCHW, settings.steps)


def cost(paradigm: Paradigm, settings: SampleSettings) -> Evaluations:
    """Of one picture."""
    return evaluations(settings.sampler, paradigm, settings.steps, guidance_of(settings))
