"""What the latent perceptual loss and its rivals share: one signature, so that a task can swap them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PerceptualContext:
    """What a perceptual loss needs beside the latents; a rival's own inputs (images, conditions) join as fields."""

    tau: float
    """The phase's noise threshold, as configured: a loss scales it to the resolution itself."""
    resolution: int
    """Side of the images that the latents stand for, in pixels."""


class PerceptualLoss(Protocol):
    def __call__(
        self, z0_hat_BCHW: Tensor, z0_BCHW: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss (B,), with gradient to `z0_hat_BCHW`, and named detached terms (B,). Latents are scaled."""
        ...

    def check_resolution(self, resolution: int) -> None:
        """Raises UserError where the loss is not defined at this resolution."""
        ...
