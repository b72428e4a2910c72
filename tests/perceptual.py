"""A perceptual loss's context for tests, with fixed draws."""

import torch
from torch import Tensor

from trainer.config import ParadigmConfig
from trainer.diffusion.paradigms import build_paradigm
from trainer.losses.perceptual import PerceptualContext


def make_context(z0_BCHW: Tensor, *, threshold: float = 3.0, downsampling: int = 8, **fields) -> PerceptualContext:
    size, side = len(z0_BCHW), z0_BCHW.shape[-1] * downsampling

    def generator(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(len(purpose))

    return PerceptualContext(
        **{
            "threshold": threshold,
            "phase_step": 0,
            "paradigm": build_paradigm(ParadigmConfig(kind="ddpm_eps"), resolution=side),
            "images_BCHW": torch.zeros(size, 3, side, side),
            "denoising_B": torch.ones(size),
            "text": None,
            "uniform": lambda purpose: torch.rand(size, generator=generator(purpose), dtype=torch.float64),
            "normal": lambda purpose: torch.randn(z0_BCHW.shape, generator=generator(purpose)).to(z0_BCHW),
            **fields,
        }
    )
