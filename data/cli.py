"""`loupe data`: build a dataset and verify one."""

from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LISTED = 20
"""Rejected images or failures that are shown; all of them are counted."""


@click.group("data")
def cli() -> None:
    """Build and verify datasets."""


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out")
@click.option("--size", type=click.IntRange(8, 16384), help="Shrink so that the shorter side is this, in pixels.")
@click.option("--format", "image_format", type=click.Choice(["keep", "jpeg", "webp"]), default="keep",
              show_default=True, help="Format of the images; keep: their own.")  # fmt: skip
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True,
              help="Of JPEG and WebP images that are encoded anew.")  # fmt: skip
@click.option("--shard-mib", type=click.IntRange(1, 4095), default=64, show_default=True, help="Size of a shard.")
@click.option("--max-samples", type=click.IntRange(1), help="Stop after so many images.")
@click.option("--order-seed", type=click.IntRange(0),
              help="Put the images in an order drawn from this seed; else the source's order.")  # fmt: skip
@click.option("--name", help="Name of the dataset; the last part of OUT when absent.")
@click.option("--overwrite", is_flag=True, help="Replace the dataset at OUT.")
def build(
    source: Path,
    out: str,
    size: int | None,
    image_format: str,
    quality: int,
    shard_mib: int,
    max_samples: int | None,
    order_seed: int | None,
    name: str | None,
    overwrite: bool,
) -> None:
    """Build a dataset at OUT, a folder or a URL such as s3://bucket/photos, from the images in the folder SOURCE.

    SOURCE is one of:

    \b
    metadata.jsonl    rows with file_name and text or captions, and label if any;
                      images beside it or under images/
    texts             images, each with a .txt of the same name; a caption a line
    class folders     one folder per class, whose name is label and caption

    Images are kept byte for byte unless --size or --format ask otherwise. Those that cannot be used are counted and
    listed, and stand in rejected.jsonl. Licence files of SOURCE (NOTICE, LICENSE) travel with the dataset. Nothing
    appears at OUT before the dataset is whole.

    Examples:

    \b
      loupe data build photos runs/photos-data
      loupe data build photos s3://bucket/photos-256 --size 256 --format jpeg
      loupe data build classes out/classes --max-samples 1000 --order-seed 0
    """
    from data.build import build as build_dataset
    from data.schema import Resize
    from data.source import open_source

    console = Console(stderr=True)
    resize = Resize.model_validate(
        {
            "short_side": size,
            "format": image_format,
            "quality": quality if size or image_format != "keep" else None,
        }
    )
    with console.status(f"listing {escape(str(source))}"):
        found = open_source(source)
    with _progress(console) as progress:
        task = progress.add_task("building", total=len(found.entries))
        built = build_dataset(
            found,
            out,
            name=name or out.rstrip("/").rpartition("/")[2],
            resize=resize,
            shard_mib=shard_mib,
            max_samples=max_samples,
            order_seed=order_seed,
            overwrite=overwrite,
            progress=lambda: progress.advance(task),
        )
    click.echo(
        f"{out}: {_count(built.info.num_samples, 'sample')} in {_count(built.num_shards, 'shard')}, "
        f"{built.num_bytes / 1e6:.2f} MB, from {found.layout}"
    )
    if built.info.class_names:
        click.echo(f"classes: {', '.join(built.info.class_names)}")
    if built.info.merged_rows:
        click.echo(f"merged: {_count(built.info.merged_rows, 'row')} named an image again")
    for reason, count in built.info.rejected.items():
        click.echo(f"rejected: {_count(count, 'image')}, {reason}")
    _list([f"{r.file_name}: {r.reason}: {r.detail}" for r in built.rejected], f"{out}/rejected.jsonl")


@cli.command()
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="SOURCE...")
@click.argument("out")
@click.option(
    "--heldout", type=click.IntRange(1), default=96, show_default=True, help="Images to hold out, of all folders."
)
@click.option("--size", type=click.IntRange(8, 16384), help="Shrink so that the shorter side is this, in pixels.")
@click.option("--overwrite", is_flag=True, help="Replace the datasets at OUT.")
def split(sources: tuple[Path, ...], out: str, heldout: int, size: int | None, overwrite: bool) -> None:
    """Build datasets in the folder or URL OUT from folders of images: one of each to train on, and one of images held out.

    \b
    OUT/train/NAME     a dataset for each SOURCE, by its folder's name
    OUT/heldout        images of all of them, and none that is in the others
    OUT/split.json     how many; written last

    Held-out images are chosen by a hash of their file names, so the same folders give the same ones. A folder gives as many as
    the square root of its size says, at most half of it. SOURCE is a folder as `loupe data build` takes it.

    Examples:

    \b
      loupe data split photos runs/photos-split --heldout 64 --size 160
      loupe data split products satellite runs/both --heldout 500 --size 512
    """
    from data.build import build as build_dataset
    from data.schema import Resize
    from data.source import open_source
    from data.split import claim, source_names, write_summary
    from data.split import split as split_sources

    console = Console(stderr=True)
    found = [open_source(source) for source in sources]
    training, held, twins = split_sources(found, heldout)
    claim(out, source_names(found), overwrite=overwrite)
    resize = Resize(short_side=size, quality=90 if size else None)
    rows: dict[str, dict[str, object]] = {}
    for name, source in [*zip(source_names(found), training, strict=True), ("", held)]:
        target = f"{out}/train/{name}" if name else f"{out}/heldout"
        with _progress(console) as progress:
            task = progress.add_task(f"building {name or 'heldout'}", total=len(source.entries))
            built = build_dataset(
                source, target, name=name or "heldout", resize=resize, overwrite=overwrite,
                progress=partial(progress.advance, task),
            )  # fmt: skip
        click.echo(
            f"{target}: {_count(built.info.num_samples, 'sample')}, {_count(len(built.rejected), 'image')} rejected"
        )
        _list([f"{r.file_name}: {r.reason}: {r.detail}" for r in built.rejected], f"{target}/rejected.jsonl")
        if name:
            rows[name] = {"images": built.info.num_samples}
        else:
            whole = {"heldout": built.info.num_samples, "train": rows, "twins": twins}
    if twins:
        click.echo(f"left out: {_count(twins, 'image')} equal to one held out")
    write_summary(out, whole)


@cli.command()
@click.argument("dataset")
@click.option("--cache-dir", help="Folder for the shards of a remote dataset; a temporary one when absent.")
def verify(dataset: str, cache_dir: str | None) -> None:
    """Verify DATASET, a folder or a URL: every hash, every count, and that every image can be decoded.

    Exits with 1 if anything is wrong.

    Examples:

    \b
      loupe data verify data/assets/emoji_64
      loupe data verify s3://bucket/photos-256
    """
    from data.verify import verify as verify_dataset

    console = Console(stderr=True)
    with _progress(console) as progress:
        task = progress.add_task("verifying", total=None)
        report = verify_dataset(
            dataset,
            cache_dir=cache_dir,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if report.failures:
        click.echo(f"{dataset}: {_count(len(report.failures), 'failure')}")
        _list(report.failures, None)
        raise click.exceptions.Exit(1)
    click.echo(
        f"{dataset}: whole; {_count(report.num_samples, 'sample')} in {_count(report.num_shards, 'shard')}, "
        f"{report.num_bytes / 1e6:.2f} MB, digest {report.digest}"
    )


def _progress(console: Console) -> Progress:
    # disabled where nobody watches: rich would leave an empty line there
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    console=console, transient=True, disable=not console.is_terminal)  # fmt: skip


def _list(lines: list[str], rest_in: str | None) -> None:
    for line in lines[:_LISTED]:
        click.echo(f"  {line}")
    if len(lines) > _LISTED:
        click.echo(f"  and {len(lines) - _LISTED} more" + (f", see {rest_in}" if rest_in else ""))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
