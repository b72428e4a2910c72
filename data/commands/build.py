"""`loupe data build`."""

from pathlib import Path

import click
from click.core import ParameterSource

from data.commands.stage import StageOptions, run, stage_options, watch

_OF_FOLDERS = {"size": "--size", "image_format": "--format", "quality": "--quality", "max_samples": "--max-samples"}
_OF_STAGES = {
    "captions": "--captions", "columns": "--columns", "min_samples": "--min-samples-of-a-bucket", "work": "--work",
    "workers": "--workers", "watch": "--watch", "dry_run": "--dry-run", "cluster": "--cluster", "array": "--array",
    "retry_failed": "--retry-failed",
}  # fmt: skip


@click.command()
@click.argument("source")
@click.argument("out")
@click.option("--buckets", metavar="LIST",
              help="Sort images into buckets of these shapes, width to height: such as 2:3,1:1,3:2; default: nine from 1:2 to "
              "2:1; none. Of a stage's output `default` when absent, of a folder `none`.")  # fmt: skip
@click.option("--min-samples-of-a-bucket", "min_samples", type=click.IntRange(1), default=1000, show_default=True,
              help="The images of a smaller bucket go to the nearest that has enough.")  # fmt: skip
@click.option("--captions", multiple=True, metavar="[KIND=]URL",
              help="Output of `loupe data recaption` to join by key; KIND: what to call its captions. Repeatable.")  # fmt: skip
@click.option("--columns", multiple=True, metavar="URL",
              help="Output of `loupe data encode` to store with the samples. Repeatable.")  # fmt: skip
@click.option("--work", metavar="URL", help="Folder for the state of a build by stages; OUT.work when absent.")
@click.option(
    "--size", type=click.IntRange(8, 16384), help="Of a folder: shrink so that the shorter side is this, in pixels."
)
@click.option("--format", "image_format", type=click.Choice(["keep", "jpeg", "webp"]), default="keep",
              show_default=True, help="Of a folder: format of the images; keep: their own.")  # fmt: skip
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True,
              help="Of JPEG and WebP images that are encoded anew.")  # fmt: skip
@click.option("--max-samples", type=click.IntRange(1), help="Of a folder: stop after so many images.")
@click.option("--shard-mib", type=click.IntRange(1, 4095), default=64, show_default=True, help="Size of a shard.")
@click.option("--order-seed", type=click.IntRange(0),
              help="Put the images in an order drawn from this seed. Else a folder's stay in its order, and a stage's output "
              "takes 0.")  # fmt: skip
@click.option("--name", help="Name of the dataset; the last part of OUT when absent.")
@click.option("--overwrite", is_flag=True, help="Replace the dataset at OUT.")
@stage_options
def build(
    source: str,
    out: str,
    buckets: str | None,
    min_samples: int,
    captions: tuple[str, ...],
    columns: tuple[str, ...],
    work: str | None,
    size: int | None,
    image_format: str,
    quality: int,
    max_samples: int | None,
    shard_mib: int,
    order_seed: int | None,
    name: str | None,
    overwrite: bool,
    options: StageOptions,
) -> None:
    """Build a dataset at OUT, a folder or a URL such as s3://bucket/photos, from the samples at SOURCE.

    SOURCE is the output of `loupe data ingest` or `faces`, a folder or a URL; any number of workers build it, and go on after
    they were stopped or killed. Or it is a local folder of images:

    \b
    metadata.jsonl    rows with file_name and text or captions, and label if any;
                      images beside it or under images/
    texts             images, each with a .txt of the same name; a caption a line
    class folders     one folder per class, whose name is label and caption

    Images are kept byte for byte unless --size or --format ask otherwise. Those of a folder that cannot be used are counted and
    listed, and stand in rejected.jsonl. Licence files (NOTICE, LICENSE) travel with the dataset. OUT becomes a dataset when it
    is whole, with a card: README.md, card.html and samples.png.

    Examples:

    \b
      loupe data build photos runs/photos-data
      loupe data build photos s3://bucket/photos-256 --size 256 --format jpeg
      loupe data build classes out/classes --max-samples 1000 --order-seed 0
      loupe data build s3://bucket/faces s3://bucket/set --captions s3://bucket/captions --workers 16
      loupe data build out/faces out/set --captions detailed=out/captions --columns out/latents --buckets 3:4,1:1,4:3
    """
    from data.provenance import is_stage
    from trainer.errors import UserError

    if is_stage(source):
        _refuse(_OF_FOLDERS, "is for folders of images; the images of a stage are kept as they are")
        _build_stage(source, out, buckets, min_samples, captions, columns, work, shard_mib, order_seed or 0, name, overwrite,
                     options)  # fmt: skip
        return
    if "://" in source:
        raise UserError(
            f"{source}: no output of `loupe data ingest` or `faces` there; ingest it first, or give a local folder"
        )
    if not Path(source).is_dir():
        raise UserError(
            f"{source}: no such folder; give one with images, or the output of `loupe data ingest` or `faces`"
        )
    _refuse(_OF_STAGES, "is for the output of a stage; run `loupe data ingest` on the folder first")
    _build_folder(
        Path(source), out, buckets, size, image_format, quality, max_samples, shard_mib, order_seed, name, overwrite
    )


def _refuse(options: dict[str, str], why: str) -> None:
    from trainer.errors import UserError

    context = click.get_current_context()
    for name, option in options.items():
        if context.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None):
            raise UserError(f"{option}: {why}")


def _name(out: str, name: str | None) -> str:
    return name or out.rstrip("/").rpartition("/")[2]


def _build_stage(
    source: str, out: str, buckets: str | None, min_samples: int, captions: tuple[str, ...], columns: tuple[str, ...],
    work: str | None, shard_mib: int, order_seed: int, name: str | None, overwrite: bool, options: StageOptions,
) -> None:  # fmt: skip
    from rich.console import Console

    from data.buckets import parse_aspects
    from data.commands.shown import count
    from data.mdsbuild.sidecars import Sidecar, parse_captions_option
    from data.mdsbuild.stage import BuildStage, check_place
    from data.publish import file_names
    from data.schema import DATASET
    from data.stages.store import SUMMARY, StageStore
    from data.storage import Storage
    from trainer.errors import UserError

    work = work or f"{out.rstrip('/')}.work"
    if options.watch:
        watch(work, Console(stderr=True))
        return
    stage = BuildStage(
        source.rstrip("/"),
        out.rstrip("/"),
        _name(out, name),
        parse_aspects(buckets or "default", option="--buckets"),
        shard_mib=shard_mib,
        order_seed=order_seed,
        min_samples=min_samples,
        captions=tuple(parse_captions_option(text) for text in captions),
        columns=tuple(Sidecar(url) for url in columns),
        overwrite=overwrite,
    )
    if not options.dry_run:
        check_place(stage, work)
    run(stage, work, options)
    if options.dry_run or options.cluster != "local":
        return
    made = StageStore(work).read_json(SUMMARY)["dataset"]
    if DATASET not in file_names(Storage(out)):
        raise UserError(
            f"{out}: this build was finished, and its dataset is no longer there; remove {work} to build it again"
        )
    click.echo(
        f"{out}: {count(made['samples'], 'sample')} in {count(made['shards'], 'shard')}, {made['bytes'] / 1e6:.2f} MB, "
        f"digest {made['digest']}; see {out}/README.md"
    )
    click.echo(f"{work}: the build's state, which may be removed")


def _build_folder(
    source: Path, out: str, buckets: str | None, size: int | None, image_format: str, quality: int, max_samples: int | None,
    shard_mib: int, order_seed: int | None, name: str | None, overwrite: bool,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.markup import escape

    from data.buckets import parse_aspects
    from data.build import build as build_dataset
    from data.commands.shown import bar, count, show_list
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
    aspects = parse_aspects(buckets or "none", option="--buckets")
    with console.status(f"listing {escape(str(source))}"):
        found = open_source(source)
    with bar(console) as progress:
        task = progress.add_task("building", total=len(found.entries))
        built = build_dataset(
            found,
            out,
            name=_name(out, name),
            resize=resize,
            shard_mib=shard_mib,
            max_samples=max_samples,
            order_seed=order_seed,
            aspects=aspects,
            overwrite=overwrite,
            progress=lambda: progress.advance(task),
        )
    click.echo(
        f"{out}: {count(built.info.num_samples, 'sample')} in {count(built.num_shards, 'shard')}, "
        f"{built.num_bytes / 1e6:.2f} MB, from {found.layout}"
    )
    if built.info.class_names:
        click.echo(f"classes: {', '.join(built.info.class_names)}")
    if built.info.buckets:
        click.echo("buckets: " + ", ".join(f"{b.name} ({count(b.num_shards, 'shard')})" for b in built.info.buckets))
    if built.info.merged_rows:
        click.echo(f"merged: {count(built.info.merged_rows, 'row')} named an image again")
    for reason, number in built.info.rejected.items():
        click.echo(f"rejected: {count(number, 'image')}, {reason}")
    show_list([f"{r.file_name}: {r.reason}: {r.detail}" for r in built.rejected], f"{out}/rejected.jsonl")
