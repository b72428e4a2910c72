"""`loupe data verify`."""

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from data.mend_stage import Mended


@click.command()
@click.argument("dataset")
@click.option("--workers", type=click.IntRange(1), show_default="cores of this machine",
              help="Processes that check shards.")  # fmt: skip
@click.option("--sample", type=click.IntRange(0), metavar="N",
              help="Decode N images, drawn at random, instead of all; everything else is checked of all.")  # fmt: skip
@click.option("--cache-dir", help="Folder for the shards of a remote dataset; a temporary one when absent.")
@click.option(
    "--repair", "mirror", metavar="URL", help="Replace damaged shards by those of the same hash at URL, a copy."
)
@click.option("--quarantine", "set_aside", is_flag=True,
              help="Take damaged shards out of the dataset, into its folder `quarantine`. The dataset is another one then: "
              "runs on the old one cannot resume on it. Of a stage's output: take out what is damaged, so that running the "
              "stage again makes it anew.")  # fmt: skip
@click.option("--remake-later-passes", "remake_later", is_flag=True,
              help="With --quarantine, of a stage's output: also where what was made of the damaged pass is much, which is "
              "then deleted and made anew.")  # fmt: skip
def verify(
    dataset: str,
    workers: int | None,
    sample: int | None,
    cache_dir: str | None,
    mirror: str | None,
    set_aside: bool,
    remake_later: bool,
) -> None:
    """Verify DATASET, a folder or a URL: every hash, every count, key and label, and that every image can be decoded.

    DATASET may also be the output of a stage, such as `loupe data ingest`: every file that it names, by size and hash. What is
    damaged there, and what was made of it by the stage's later passes, is taken out with --quarantine; then run the stage
    again with the command that it was begun with, which makes just that anew.

    Exits with 1 if anything is wrong and was not mended.

    Examples:

    \b
      loupe data verify data/assets/emoji_64
      loupe data verify s3://bucket/photos-256 --sample 10000 --workers 16
      loupe data verify s3://bucket/photos-256 --repair s3://mirror/photos-256 --quarantine
      loupe data verify s3://bucket/ingested
    """
    from rich.console import Console

    from data.commands.shown import bar, count, show_list
    from data.commands.sources import check_dataset
    from data.provenance import is_stage
    from data.repair import quarantine, repair
    from data.verify import verify as verify_dataset
    from trainer.errors import UserError

    console = Console(stderr=True)
    workers = workers or os.cpu_count() or 1
    if is_stage(dataset):
        if mirror is not None:
            raise UserError(
                "--repair: is for datasets; a stage's output is mended by --quarantine and running the stage again"
            )
        for option, value in (("--sample", sample), ("--cache-dir", cache_dir)):
            if value is not None:
                raise UserError(
                    f"{option}: is for datasets; of a stage's output every file is read, and no image decoded"
                )
        _verify_stage(dataset, workers, set_aside, remake_later, console)
        return
    if remake_later:
        raise UserError("--remake-later-passes: is for the output of a stage; leave it out")
    check_dataset(dataset)
    with bar(console) as progress:
        task = progress.add_task("verifying", total=None)
        report = verify_dataset(
            dataset,
            cache_dir=cache_dir,
            sample=sample,
            workers=workers,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    failures = [str(failure) for failure in report.failures]
    mendable = report.damaged or any(failure.labels for failure in report.failures)
    if mirror is not None and mendable:
        done = repair(dataset, report, mirror)
        for name in done.shards:
            click.echo(f"repaired: {name}")
        if done.labels:
            click.echo("repaired: the file of labels")
        show_list(done.failures)
        # Whole again, or not: looked at anew, and only where something was wrong.
        again = verify_dataset(dataset, cache_dir=cache_dir, sample=sample, shards=report.damaged)
        failures = [str(f) for f in report.failures if f.shard is None and not (f.labels and done.labels)]
        failures += [str(failure) for failure in again.failures]
        report.failures = again.failures
    if set_aside and report.damaged:
        digest = quarantine(dataset, report.damaged)
        click.echo(
            f"quarantined: {count(len(set(report.damaged)), 'shard')}; the dataset's digest is now {digest}, and runs on the "
            "one before cannot resume on it; `loupe data build` with --overwrite, given as before, makes it whole again"
        )
        failures = [str(failure) for failure in verify_dataset(dataset, sample=0, workers=workers).failures]
    if failures:
        click.echo(f"{dataset}: {count(len(failures), 'failure')}")
        show_list(failures)
        raise click.exceptions.Exit(1)
    if mendable:
        click.echo(f"{dataset}: mended")
        return
    click.echo(
        f"{dataset}: whole; {count(report.num_samples, 'sample')} in {count(report.num_shards, 'shard')}, "
        f"{report.num_bytes / 1e6:.2f} MB, {count(report.decoded, 'image')} decoded, digest {report.digest}"
    )


def _verify_stage(url: str, workers: int, set_aside: bool, remake_later: bool, console: object) -> None:
    from rich.console import Console

    from data.commands.shown import bar, count, show_list
    from data.mend_stage import mend
    from data.stages.receipts import MENDING
    from data.stages.store import StageStore
    from data.verify_stage import verify_stage

    assert isinstance(console, Console)
    if set_aside and StageStore(url).exists(MENDING):
        click.echo(f"{url}: going on with what was stopped in the midst")
        _tell_mended(url, mend(url, tell=click.echo))
    with bar(console) as progress:
        task = progress.add_task("verifying", total=None)
        report = verify_stage(url, threads=workers, progress=lambda files: progress.update(task, completed=files))
    if report.failures:
        click.echo(f"{url}: {count(len(report.failures), 'failure')}")
        show_list(report.failures)
        mendable = report.damaged or report.bad_summary
        if mendable and set_aside:
            _tell_mended(url, mend(url, report, remake_later=remake_later, tell=click.echo))
            if not report.lasting:
                return
            click.echo(f"{url}: cannot be mended: {count(len(report.lasting), 'failure')}")
            show_list(report.lasting)
        elif mendable:
            click.echo(f"mend it with `loupe data verify {url} --quarantine`, then run {_again(url, report.stage)}")
        raise click.exceptions.Exit(1)
    state = "whole" if report.finished else "whole so far, the stage is not finished"
    click.echo(
        f"{url}: output of `{report.stage}`, {state}; {count(report.num_files, 'file')}, {report.num_bytes / 1e6:.2f} MB"
    )


def _tell_mended(url: str, done: "Mended | None") -> None:
    from data.commands.shown import count, show_list

    if done is None:  # somebody else has come first
        return
    for name in done.files:
        click.echo(f"quarantined: {name}")
    for name, items in done.items.items():
        click.echo(f"to be made anew: {count(len(items), 'item')} of {name}, {count(done.parts, 'part')}")
        show_list(items)
    if done.passes:
        click.echo(f"to be made anew, since it follows: all of {', '.join(done.passes)}")
    click.echo(f"{url}: is not finished now; run {_again(url, done.stage)}, then verify")


def _again(url: str, stage: str) -> str:
    from data.commands.begun import begun_by
    from data.stages.store import StageStore

    command = begun_by(StageStore(url))
    return f"`{command}`" if command else f"`loupe data {stage}` again with the command that it was begun with"
