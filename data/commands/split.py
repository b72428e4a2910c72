"""`loupe data split`."""

from functools import partial
from pathlib import Path

import click


@click.command()
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
    from rich.console import Console

    from data.build import build as build_dataset
    from data.commands.shown import bar, count, show_list
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
        with bar(console) as progress:
            task = progress.add_task(f"building {name or 'heldout'}", total=len(source.entries))
            built = build_dataset(
                source, target, name=name or "heldout", resize=resize, overwrite=overwrite,
                progress=partial(progress.advance, task),
            )  # fmt: skip
        click.echo(
            f"{target}: {count(built.info.num_samples, 'sample')}, {count(len(built.rejected), 'image')} rejected"
        )
        show_list([f"{r.file_name}: {r.reason}: {r.detail}" for r in built.rejected], f"{target}/rejected.jsonl")
        if name:
            rows[name] = {"images": built.info.num_samples}
        else:
            whole = {"heldout": built.info.num_samples, "train": rows, "twins": twins}
    if twins:
        click.echo(f"left out: {count(twins, 'image')} equal to one held out")
    write_summary(out, whole)
