"""Options that both commands about images have, and how their processes begin and end."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trainer.config import resolve_url
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.evaluate.features.networks import LoadedNetwork
    from trainer.evaluate.images_run import Evaluation
    from trainer.evaluate.judged_sets import Judging

WAIT_S = 7200.0
"""Longest that a rank waits for another's images, or for rank 0 to look at what is there."""
RESIZES = ("training", "bicubic")
F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--metrics", metavar="LIST", show_default=False, help="Of fid, fid_infinity, kid, precision, recall, density, "
                 "coverage, cmmd, clip_score, spectrum; with commas.  [default: all that can be had but fid_infinity]"),
    click.option("--network", "networks", multiple=True, metavar="NAME=WEIGHTS", help="Whose features: inception (FID's), "
                 "inception_clean (clean-fid's), dinov2, clip, efficientnet_lite0, each with its file, folder or URL; or "
                 "module:function[=WEIGHTS] of yours, which is run. Repeatable."),
    click.option("--network-sha256", "sums", multiple=True, metavar="NAME=HEX", help="What its weights must have. Of "
                 "Inception, absent: its published sum. Repeatable."),
    click.option("--resize", type=click.Choice(RESIZES), default="training", help="Images of another size: as the trainer "
                 "makes its own, by area; or Pillow's bicubic."),
    click.option("--reference-count", type=click.IntRange(min=2), metavar="N", show_default=False, help="So many real images, "
                 "drawn by the seed.  [default: all]"),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of images that are chosen, and of resamples."),
    click.option("--resamples", type=click.IntRange(0, 100_000), default=1000, help="Of bootstrap intervals, for spectra 200 "
                 "at most; 0: without."),
    click.option("--allow-few", is_flag=True, help="A Frechet distance even of no more images than features."),
    click.option("--batch-size", type=click.IntRange(1, 64), default=32, help="Images that networks see at once."),
    click.option("--cache", metavar="FOLDER", show_default=False, help="Where rows of real images are kept.  [default: "
                 "$XDG_CACHE_HOME/loupe/evaluations]"),
    click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N; of torchrun's ranks, each has its own."),
    click.option("--overwrite", is_flag=True, help="Replace an evaluation in FOLDER."),
    click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and stop."),
)  # fmt: skip


def measuring_options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Process:
    """This process, of one or of several ranks."""

    judging: "Judging"
    say: Callable[[str], None]
    """On rank 0."""
    warn: Callable[[str], None]


@contextmanager
def process(device: str, batch_size: int) -> Iterator[Process]:
    """Ranks join where torchrun or SLURM has started them; a signal asks to stop."""
    from trainer.evaluate.codec_report import choose_device, progress_bar
    from trainer.evaluate.judged_sets import Judging
    from trainer.parallel.world import init_world
    from trainer.preemption import listening

    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if ranked and device != "auto":
        raise UserError(f"--device: {device} is for one process; ranks take a device each by themselves")
    place = choose_device(device)
    with listening() as stop:
        world = init_world(timeout_s=WAIT_S) if ranked else None
        is_main = world is None or world.is_main

        def say(line: str) -> None:
            if is_main:
                click.echo(line)

        def warn(line: str) -> None:
            if is_main:
                click.echo(line, err=True)

        with progress_bar() as progress:
            judging = Judging(
                world.device if world else place, batch_size, world,
                progress if is_main else lambda what, done, total: None, warn, lambda: stop.received is not None,
            )  # fmt: skip
            yield Process(judging, say, warn)
        if world:
            import torch.distributed as dist

            # after an error they are left as they are: another rank may never answer
            dist.destroy_process_group()


def check_there(argument: str, url: str) -> None:
    """Before what takes seconds to import: whether images on this machine are there.

    Raises:
        UserError: they are not.
    """
    path = resolve_url(url)
    if "://" not in path and not os.path.exists(path):
        raise UserError(f"{argument}: {url}: no such folder; give one with images, or a dataset of `loupe data build`")


def check_enough(
    generated: int, real: int, networks: "Sequence[LoadedNetwork]", chosen: Sequence[str], *, allow_few: bool
) -> None:
    """`check_counts` before a picture is drawn or seen by a network.

    Raises:
        UserError: as it does.
    """
    from trainer.evaluate.image_measures import check_counts

    dimensions = {network.name: network.network.dimensions for network in networks}
    check_counts(generated, real, dimensions, chosen, allow_few=allow_few)


@contextmanager
def claimed(out: str, process: Process, *, overwrite: bool, dry_run: bool, made: Sequence[str] = ()) -> Iterator[Path]:
    """`images_run.claim`. Where what follows is refused, a folder that was made here goes again, unless work is in it.

    Args:
        made: files that are no work.
    """
    from trainer.evaluate.images_run import claim

    ranks = process.judging.ranks
    was_there = ranks.on_rank_0(lambda: os.path.exists(out))
    folder = ranks.on_rank_0(lambda: claim(out, overwrite=overwrite, dry_run=dry_run))
    try:
        yield folder
    except UserError:
        if not was_there and ranks.rank == 0 and folder.is_dir() and {p.name for p in folder.iterdir()} <= set(made):
            for name in made:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        raise


def load_networks(words: Sequence[str], sums: Sequence[str], judging: "Judging") -> "list[LoadedNetwork]":
    """On the device; each rank its own."""
    from trainer.evaluate.features.networks import build_network, parse_networks

    parsed = parse_networks(words, sums)
    return judging.ranks.on_all(lambda: [build_network(*of_one).to(judging.device) for of_one in parsed])


def tell(found: "Evaluation", folder: Path, process: Process) -> None:
    from trainer.evaluate.image_measures import in_words
    from trainer.evaluate.images_run import NUMBERS

    numbers = found.numbers
    for warning in numbers["warnings"]:
        process.warn(f"warning: {warning}")
    generated, real = numbers["generated"], numbers["real"]
    process.say(
        f"{generated['used']} generated images against {real['used']} real ones at {numbers['settings']['size']} px; "
        f"definition {numbers['definition']}"
    )
    width = max(map(len, found.figures))
    for name, figure in found.figures.items():
        process.say(in_words(name, figure, width))
    process.say(f"{folder / NUMBERS}, {', '.join(sorted(found.pictures))}")


def tell_finished(found: "Evaluation | None", folder: Path, process: Process) -> bool:
    """Whether the evaluation that is asked for is there."""
    if found is None:
        return False
    process.say(f"{folder} has this evaluation already; --overwrite makes it anew")
    tell(found, folder, process)
    return True
