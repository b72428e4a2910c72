"""How pictures are drawn. No torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import LatentDiffusionConfig, SamplesConfig, size_multiple
from trainer.config.sampling import MOST_DDPM_STEPS, SAMPLERS, samplers_of
from trainer.errors import UserError

LARGEST_PX = 16_384


@dataclass(frozen=True)
class SampleSettings:
    """With a model, a prompt and a position they give one picture."""

    sampler: str
    """Of `trainer.config.sampling.SAMPLERS`."""
    steps: int
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none, and half of the network's work."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance is applied at times from the first to the second, both of them included, as shares of the diffusion's time:
    t of flow, the timestep over T of DDPM. 0 is data, 1 noise. Absent: always."""
    guidance_rescale: float = 0.0
    """phi of Lin et al. 2024, section 3.4."""
    seed: int = 0
    resolution: int = 256
    """Height of the pictures, in pixels."""
    width: int | None = None
    """Absent: they are squares."""

    @classmethod
    def of(cls, samples: SamplesConfig, *, resolution: int) -> "SampleSettings":
        """Those of a run's sample grids."""
        return cls(
            samples.sampler, samples.num_steps, samples.guidance_scale, samples.guidance_interval,
            samples.guidance_rescale, samples.seed, resolution,
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.resolution, self.width or self.resolution

    @property
    def side(self) -> int:
        """Of the square of about their area: what noise levels shift with, as in training with aspect buckets."""
        height, width = self.size
        return round(math.sqrt(height * width))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "guidance_interval": self.guidance_interval and list(self.guidance_interval)}

    def check(self, task: LatentDiffusionConfig) -> None:
        """Whether a model of this config can draw so.

        Raises:
            UserError: naming the option of `loupe sample` that it cannot do.
        """
        paradigm = task.paradigm.kind
        fitting = ", ".join(samplers_of(paradigm))
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler: {self.sampler!r} is none; this model's paradigm, {paradigm}, takes {fitting}")
        if self.sampler not in samplers_of(paradigm):
            raise UserError(
                f"--sampler: {self.sampler} does not go with {paradigm}, as the model predicts; take {fitting}"
            )
        if self.steps < 1:
            raise UserError(f"--steps: {self.steps} is not positive; 25 to 50 are usual")
        if paradigm != "flow" and self.steps > MOST_DDPM_STEPS:
            raise UserError(
                f"--steps: {self.steps} is more than the {MOST_DDPM_STEPS} of the schedule; 25 to 50 are usual"
            )
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"--guidance: {self.guidance:g} is no scale; take 0 or more, 1 for none")
        if self.guidance_interval is not None:
            first, last = self.guidance_interval
            if not 0 <= first <= last <= 1:
                raise UserError(f"--guidance-interval: {first:g} to {last:g}; give two shares of the diffusion's time, 0 "
                                "(data) to 1 (noise), the smaller first")  # fmt: skip
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"--guidance-rescale: {self.guidance_rescale:g} is not within 0 to 1; 0.7 is usual")
        self._check_size(task)

    def _check_size(self, task: LatentDiffusionConfig) -> None:
        multiple, model = size_multiple(task), task.model
        for side in self.size:
            if side < multiple or side % multiple:
                below = max(multiple, side // multiple * multiple)
                raise UserError(
                    f"--size: {side} px is no multiple of {multiple}, the codec's downsampling of {task.codec.downsampling} "
                    f"times the model's {model.latent_multiple}; take {below} or {below + multiple}"
                )
            if side > LARGEST_PX:
                raise UserError(f"--size: {side} px, {LARGEST_PX} at most")
            if model.kind == "mmdit" and model.position_growth == "extend" and side // multiple > model.position_grid:
                raise UserError(
                    f"--size: {side} px are {side // multiple} patches a side, and the model has positions for "
                    f"{model.position_grid}; take {model.position_grid * multiple} px or less"
                )
