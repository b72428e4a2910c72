"""`loupe sample` in one of its processes: opens the model, draws this process's share, and says what there is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.folder import NAME
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.errors import ExitCode, UserError, one_line
from trainer.parallel.world import World
from trainer.pictures import sample_grid
from trainer.run_folder import CHECKPOINTS, EMA_SNAPSHOTS
from trainer.sampling.drawing import Part, Progress, Work, draw_all, lots_to_draw, prepare
from trainer.sampling.model import SamplingModel
from trainer.sampling.output import SampleFolder
from trainer.sampling.prompts import Prompt, gathered
from trainer.sampling.settings import SampleSettings
from trainer.sampling.weights import POST_HOC, opened
from trainer.whole_files import write_whole

GRID = 64
"""Pictures of a grid, at most."""
IN_MEMORY = 256
"""Pictures without a folder, at most."""
STEPS, GUIDANCE = 50, 2.0
"""Of a run that draws no sample grids."""


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


def pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def run(
    options: Options,
    place: torch.device,
    *,
    world: World | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], object] = print,
    progress: Progress = lambda what, done, total: None,
) -> ExitCode:
    """The whole command, after its words. A collective where there is a world; rank 0 says what there is to say.

    Raises:
        UserError: as the message says, on all ranks.
    """
    options.check()
    ranks = Ranks(world.host_group if world else None)
    tell = say if ranks.rank == 0 else lambda line: None
    folder = None if options.out is None else SampleFolder(options.out)
    work = _open(options, place, folder, ranks)
    about, count = work.about(), len(work.prompts)
    for line in _plan(work, about, options):
        tell(line)
    if options.dry_run:
        left = ranks.on_rank_0(lambda: len(folder.missing(count)) if folder and not options.overwrite else count)
        tell(f"would draw {left} of {pictures(count)}" + (f" into {folder.path}" if folder else ""))
        return ExitCode.DONE

    earlier: dict[str, Any] = {}
    missing = list(range(count))
    if folder is not None:
        earlier, missing = ranks.on_rank_0(lambda: _claimed(folder, about, count, overwrite=options.overwrite))
    if len(missing) < count:
        tell(f"{count - len(missing)} of {count} pictures are there")
    kept: dict[int, np.ndarray] = {}
    drawn = draw_all(
        work, lots_to_draw(missing, work.lot, options.part), folder.add if folder else kept.__setitem__, world=world,
        lots_at_once=max(1, options.batch_size // work.lot), stop=stop, progress=progress,
    )  # fmt: skip
    if world and folder is None:
        kept = {position: image for part in world.gather(kept) for position, image in part.items()}
    about |= {
        "ranks": ranks.world_size,
        "drawn": earlier.get("drawn", 0) + drawn.count,
        "seconds": round(earlier.get("seconds", 0.0) + drawn.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    tell(f"drew {pictures(drawn.count)} in {drawn.seconds:.1f} s")
    code = ExitCode.REQUEUE if drawn.stopped else ExitCode.DONE
    if drawn.stopped:
        if folder is not None:
            ranks.on_rank_0(lambda: folder.note(about))
        tell("stopped by a signal; the same command goes on")
    elif ranks.rank == 0:
        for line in _finish(options, work, folder, kept, about):
            say(line)
    return code


def _open(options: Options, place: torch.device, folder: SampleFolder | None, ranks: Ranks) -> Work:
    o = options
    prompts = ranks.on_rank_0(lambda: gathered(o.prompts, o.files, o.classes, per_prompt=o.per_prompt))
    if folder is None and len(prompts) > IN_MEMORY:
        raise UserError(
            f"--out: {len(prompts)} pictures need a folder; give --out FOLDER, or {IN_MEMORY} prompts at most"
        )
    source, weights = ranks.on_rank_0(lambda: source_of(o.source, o.weights, None if o.overwrite else folder))
    settings = ranks.on_all(lambda: o.settings(opened(source).config))
    model = SamplingModel.open(source, place, weights=weights, group=ranks.group)
    return ranks.on_all(lambda: prepare(model, prompts, settings, lot=o.lot))


def source_of(source: str, weights: str, folder: SampleFolder | None) -> tuple[str, str]:
    """The checkpoint that a folder's earlier pictures are of, or the step of their snapshot, where `source` is its run; else
    `source` and `weights` themselves. A run that goes on has newer ones, and the same command is to go on where it ended."""
    about = folder.about() if folder else None
    if about is None:
        return source, weights
    run, drawn, drawn_with = opened(source), str(about.get("source", "")), str(about["identity"].get("weights"))
    if run.checkpoint is not None:
        return source, weights
    if weights.startswith(POST_HOC):
        is_its_own = drawn == f"{run.url}/{EMA_SNAPSHOTS}" and drawn_with.startswith(f"{weights}@")
        return source, drawn_with if is_its_own else weights
    above, _, name = drawn.rpartition("/")
    is_its_own = above == f"{run.url}/{CHECKPOINTS}" and NAME.fullmatch(name) is not None
    return drawn if is_its_own and drawn_with == weights else source, weights


def _plan(work: Work, about: dict[str, Any], options: Options) -> list[str]:
    """What is drawn with what, in lines."""
    settings, cost = work.settings, about["cost"]
    height, width = settings.size
    guidance = f"guidance {settings.guidance:g}"
    if settings.guidance_interval:
        guidance += " at times {:g} to {:g}".format(*settings.guidance_interval)
    if settings.guidance_rescale:
        guidance += f" rescaled by {settings.guidance_rescale:g}"
    lines = [
        f"{work.model.source}: step {work.model.step}, weights {work.model.weights}",
        f"{pictures(len(work.prompts))} of {width} x {height} px: {settings.sampler}, {settings.steps} steps, {guidance}, seed "
        f"{settings.seed}; NFE {cost['nfe']}, {cost['network_passes']} network passes a picture",
    ]
    if about["truncated"]:
        lines.append(f"WARNING: {about['truncated']} prompts are longer than the text encoder takes, and are cut")
    if options.part.count > 1:
        lines.append(f"part {options.part.index} of {options.part.count}")
    return lines


def _claimed(
    folder: SampleFolder, about: dict[str, Any], count: int, *, overwrite: bool
) -> tuple[dict[str, Any], list[int]]:
    """(what earlier starts said of the folder, positions without a picture)."""
    folder.claim(about, overwrite=overwrite)
    return folder.about() or {}, folder.missing(count)


def _finish(
    options: Options, work: Work, folder: SampleFolder | None, kept: dict[int, np.ndarray], about: dict[str, Any]
) -> list[str]:
    """The end, where all pictures are there; in lines."""
    lines, count = [], len(work.prompts)
    if folder is not None:
        missing = folder.missing(count)
        if missing:
            return [
                f"{len(missing)} of {count} pictures are missing, which other parts draw; the last one completes the folder"
            ]
        folder.finish(about, work.prompts, work.cut)
        lines.append(f"{folder.path}: {pictures(count)}, samples.json, samples.jsonl")
    if options.grid is not None:
        shown = range(min(count, GRID))
        images = [folder.image(i) if folder else kept[i] for i in shown]
        try:
            write_whole(Path(options.grid), grid_of(images, work.prompts))
        except OSError as e:
            raise UserError(f"--grid: {options.grid} cannot be written ({one_line(e)})") from None
        lines.append(f"{options.grid}: {len(shown)} of {count} pictures" if len(shown) < count else options.grid)
    return lines


def grid_of(images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> bytes:
    """PNG of the first pictures with their prompts below."""
    words = [f"class {p}" if isinstance(p, int) else p or "(no prompt)" for p in prompts[: len(images)]]
    return sample_grid(np.stack(images), words)
