"""`loupe sample` in one of its processes: opens the model, draws this process's share, and says what there is."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.collective import Ranks
from trainer.checkpoint.folder import NAME
from trainer.errors import ExitCode, UserError, one_line
from trainer.parallel.world import World
from trainer.pictures import sample_grid
from trainer.run_folder import CHECKPOINTS, EMA_SNAPSHOTS
from trainer.sampling.drawing import Progress, Work, draw_all, lots_to_draw, prepare
from trainer.sampling.model import SamplingModel
from trainer.sampling.options import Options
from trainer.sampling.output import SampleFolder
from trainer.sampling.prompts import Prompt, check_kinds, gathered, num_classes_of
from trainer.sampling.source import POST_HOC, opened
from trainer.whole_files import write_whole

GRID = 64
"""Pictures of a grid, at most."""
IN_MEMORY = 256
"""Pictures without a folder, at most."""


def pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


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
    ranks = Ranks(world.host_group if world else None)
    ranks.on_rank_0(options.check)  # which alone reads the prompts' files
    tell = say if ranks.rank == 0 else lambda line: None
    folder = None if options.out is None else SampleFolder(options.out)
    work = _open(options, place, folder, ranks)
    about, count = work.about(), len(work.prompts)
    for line in _plan(work, about, options):
        tell(line)
    if options.dry_run:
        absent = ranks.on_rank_0(lambda: _absent(folder, about, count, overwrite=options.overwrite))
        left = sum(map(len, lots_to_draw(absent, work.lot, options.part)))
        tell(f"would draw {left} of {pictures(count)}" + (f" into {folder.path}" if folder else ""))
        return ExitCode.DONE

    missing = list(range(count))
    if folder is not None:
        missing = ranks.on_rank_0(lambda: _claimed(folder, about, count, overwrite=options.overwrite))
    if len(missing) < count:
        tell(f"{count - len(missing)} of {count} pictures are there")
    kept: dict[int, np.ndarray] = {}
    drawn = draw_all(
        work, lots_to_draw(missing, work.lot, options.part), folder.add if folder else kept.__setitem__, world=world,
        lots_at_once=max(1, options.batch_size // work.lot), stop=stop, progress=progress,
    )  # fmt: skip
    if world and folder is None:
        kept = {position: image for part in world.gather(kept) for position, image in part.items()}
    about |= {"ranks": ranks.world_size, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if folder is not None:
        ranks.on_rank_0(lambda: folder.add_work(options.part, drawn.count, drawn.seconds))
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


def _absent(folder: SampleFolder | None, about: dict[str, Any], count: int, *, overwrite: bool) -> Sequence[int]:
    """What a dry run would draw; refused where the drawing would be."""
    if folder is None:
        return range(count)
    folder.check(about, overwrite=overwrite)
    return range(count) if overwrite else folder.missing(count)


def _open(options: Options, place: torch.device, folder: SampleFolder | None, ranks: Ranks) -> Work:
    o = options
    prompts = ranks.on_rank_0(lambda: _prompts(o))
    if folder is None and len(prompts) > IN_MEMORY:
        raise UserError(
            f"--out: {len(prompts)} pictures need a folder; give --out FOLDER, or {IN_MEMORY} prompts at most"
        )
    source, weights = ranks.on_rank_0(lambda: source_of(o.source, o.weights, None if o.overwrite else folder))
    settings = ranks.on_all(lambda: o.settings(opened(source).config))
    model = SamplingModel.open(source, place, weights=weights, group=ranks.group)
    return ranks.on_all(lambda: prepare(model, prompts, settings, lot=o.lot))


def _prompts(o: Options) -> list[Prompt]:
    prompts = gathered(o.prompts, o.files, o.classes, per_prompt=o.per_prompt)
    config, given = opened(o.source).config, "--classes" if o.classes else "--prompts"
    check_kinds(
        prompts[: len(prompts) // o.per_prompt], num_classes_of(config),
        lambda position: "--prompt" if position < len(o.prompts) else given,
    )  # fmt: skip
    return prompts


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
        f"{work.model.source}: step {work.model.step or 'unknown'}, weights {work.model.weights}",
        f"{pictures(len(work.prompts))} of {width} x {height} px: {settings.sampler}, {settings.steps} step"
        f"{'s' * (settings.steps != 1)}, {guidance}, seed {settings.seed}; NFE {cost['nfe']}, {cost['network_passes']} network "
        f"pass{'es' * (cost['network_passes'] != 1)} a picture",
    ]
    if about["truncated"]:
        cut = about["truncated"]
        are = "1 prompt is" if cut == 1 else f"{cut} prompts are"
        lines.append(f"WARNING: {are} longer than the text encoder takes, and cut")
    if options.part.count > 1:
        lines.append(f"part {options.part.index} of {options.part.count}")
    return lines


def _claimed(folder: SampleFolder, about: dict[str, Any], count: int, *, overwrite: bool) -> list[int]:
    """Positions without a picture."""
    folder.claim(about, overwrite=overwrite)
    return folder.missing(count)


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
