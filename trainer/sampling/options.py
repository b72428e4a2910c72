"""What `loupe sample` was asked for, and what can be said of it before a network is built. No torch."""

from dataclasses import dataclass, field
from typing import Any

from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.errors import UserError
from trainer.sampling.prompts import check_words
from trainer.sampling.settings import SampleSettings
from trainer.sampling.source import check_weights, opened

STEPS, GUIDANCE = 50, 2.0
"""Of a run that draws no sample grids."""


@dataclass(frozen=True)
class Part:
    """Of several jobs that share a folder: number `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Options:
    """The command's, as they were given; None: as the run has it."""

    source: str
    weights: str = "ema"
    prompts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    per_prompt: int = 1
    out: str | None = None
    grid: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    """(height, width) in pixels."""
    batch_size: int = 8
    lot: int | None = None
    part: Part = field(default_factory=Part)
    overwrite: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """What can be told before anything is read.

        Raises:
            UserError: naming the option.
        """
        if self.out is None and self.grid is None:
            raise UserError("--out: nowhere to draw to; give --out FOLDER, --grid FILE.png, or both")
        if self.grid is not None and not self.grid.lower().endswith(".png"):
            raise UserError(f"--grid: {self.grid} is no .png file; give one")
        if self.part.count > 1 and self.out is None:
            raise UserError("--part: needs a folder that all parts share; give --out FOLDER")
        if self.part.count > 1 and self.overwrite:
            raise UserError("--overwrite: goes without --part; one part would remove what another has drawn")
        check_words(self.prompts, self.files, self.classes)
        check_weights(self.weights)

    def check_run(self) -> None:
        """What the run's config alone tells.

        Raises:
            UserError: no run there, or one whose model cannot draw so.
        """
        config = opened(self.source).config
        settings = self.settings(config)
        assert isinstance(config.task, LatentDiffusionConfig)
        settings.check(config.task)

    def settings(self, config: RunConfig) -> SampleSettings:
        """With the run's own in place of those that were not given."""
        task = config.task
        if not isinstance(task, LatentDiffusionConfig):
            raise UserError(
                f"{self.source}: a run of {task.kind}, which draws no pictures; give one of latent_diffusion"
            )
        own, given = config.samples, self.guidance_interval
        height, width = self.size or (config.phases[-1].resolution,) * 2
        sampler = "euler" if task.paradigm.kind == "flow" else "ddim"
        return SampleSettings(
            sampler=_first(self.sampler, own and own.sampler, sampler),
            steps=_first(self.steps, own and own.num_steps, STEPS),
            guidance=_first(self.guidance, own and own.guidance_scale, GUIDANCE),
            guidance_interval=given if given is not None or own is None else own.guidance_interval,
            guidance_rescale=_first(self.guidance_rescale, own and own.guidance_rescale, 0.0),
            seed=self.seed,
            resolution=height,
            width=None if width == height else width,
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
