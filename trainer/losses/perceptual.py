"""What the latent perceptual loss and its rivals share: one signature, so that a recipe swaps one for another by a word."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.diffusion.paradigms import Paradigm

Draw = Literal["second_noise", "second_timestep", "estimator", "augmentation"]
"""What random numbers are for, of `trainer.rng`'s purposes."""


@dataclass(frozen=True)
class PerceptualContext:
    """What a perceptual loss may need beside the latents."""

    threshold: float
    """Largest noise level at which the loss counts; inf: all count."""
    phase_step: int
    """Steps done since the phase began."""
    paradigm: Paradigm
    images_BCHW: Tensor
    """The input images, in [-1, 1]."""
    denoising_B: Tensor
    """The denoising loss of each sample, with its graph, before any weight."""
    text: Any
    """What the trained module takes as its text."""
    uniform: Callable[[Draw], Tensor]
    """purpose -> float64 (B,) in [0, 1) on the host: a function of seed, stream position and purpose."""
    normal: Callable[[Draw], Tensor]
    """purpose -> standard normal of the latents' shape on the device, likewise."""


class PerceptualLoss(nn.Module, ABC):
    """Frozen: what it holds is never trained, and stays in evaluation mode."""

    name: str
    """Of its term among the metrics; terms of its own begin with it and an underscore."""

    @abstractmethod
    def forward(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss (B,), with gradient to `z0_hat_BCHW`, exactly 0 outside the gate and non-finite for a sample inside
        it that is; and named detached terms (B,). The mean over the batch, zeros included, is the loss.

        Args:
            z0_hat_BCHW, z0_BCHW: scaled latents.
            noise_level_B: sigma/alpha, on the host, so that the gate is known there and nothing waits for the device.
        """

    is_measured: bool = True
    """Whether `measure` says something that the denoising loss does not."""

    @torch.no_grad()
    def measure(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> Tensor:
        """The loss of each sample (B,), of all of them whatever their noise level, for a validation: nothing that training
        goes by is changed. Where the module is sharded, a collective."""
        return self(z0_hat_BCHW, z0_BCHW, noise_level_B, replace(context, threshold=math.inf))[0]  # type: ignore[no-any-return]

    def check(self, resolution: int) -> list[str]:
        """Before the first step: warnings to print.

        Raises:
            UserError: where the loss is not defined at this resolution.
        """
        return []

    def begin_phase(self, trained: nn.Module) -> None:
        """At the first step of each phase that has the loss, before anything else of the step."""

    def end_step(self, keep: Tensor) -> None:
        """After each step that had the loss: a collective. `keep`: 1.0 on every rank where the step counts, on the device.
        What is estimated from losses is renewed here alone, so it is the same for any layout."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the loss, written and read in place; equal on all ranks, or sharded."""
        return {}

    def sharded(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Modules to be sharded as the trained one is, each with its units."""
        return []

    def train(self, mode: bool = True) -> "PerceptualLoss":
        super().train(False)
        return self
