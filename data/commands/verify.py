"""`loupe data verify`."""

import os

import click


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
              "runs on the old one cannot resume on it.")  # fmt: skip
def verify(
    dataset: str, workers: int | None, sample: int | None, cache_dir: str | None, mirror: str | None, set_aside: bool
) -> None:
    """Verify DATASET, a folder or a URL: every hash, every count, key and label, and that every image can be decoded.

    DATASET may also be the output of a stage, such as `loupe data ingest`: every file that it names, by size and hash.

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
    from data.provenance import is_stage
    from data.repair import quarantine, repair
    from data.verify import verify as verify_dataset
    from trainer.errors import UserError

    console = Console(stderr=True)
    workers = workers or os.cpu_count() or 1
    if is_stage(dataset):
        if mirror is not None or set_aside:
            raise UserError("--repair and --quarantine: are for datasets; run the stage again to mend its output")
        _verify_stage(dataset, workers, console)
        return
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
            "one before cannot resume on it"
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


def _verify_stage(url: str, workers: int, console: object) -> None:
    from rich.console import Console

    from data.commands.shown import bar, count, show_list
    from data.verify_stage import verify_stage

    assert isinstance(console, Console)
    with bar(console) as progress:
        task = progress.add_task("verifying", total=None)
        report = verify_stage(url, threads=workers, progress=lambda files: progress.update(task, completed=files))
    if report.failures:
        click.echo(f"{url}: {count(len(report.failures), 'failure')}")
        show_list(report.failures)
        raise click.exceptions.Exit(1)
    state = "whole" if report.finished else "whole so far, the stage is not finished"
    click.echo(
        f"{url}: output of `{report.stage}`, {state}; {count(report.num_files, 'file')}, {report.num_bytes / 1e6:.2f} MB"
    )
