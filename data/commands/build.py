"""`loupe data build`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from data.commands.stage import StageOptions, run, stage_options_of_all_or_nothing
from data.commands.watching import StageCommand

if TYPE_CHECKING:
    from data.mdsbuild.stage import BuildStage

_OF_FOLDERS = {"size": "--size", "image_format": "--format", "quality": "--quality", "max_samples": "--max-samples"}
_OF_STAGES = {
    "captions": "--captions", "columns": "--columns", "min_samples": "--min-samples-of-a-bucket", "work": "--work",
    "lease_s": "--lease-s", "cluster": "--cluster", "array": "--array", "retry_failed": "--retry-failed",
    "give_up_failed": "--give-up-failed",
}  # fmt: skip


class _BuildCommand(StageCommand):
    def watched(self, out: str, values: Mapping[str, Any]) -> str:
        return str(values["work"]) if isinstance(values.get("work"), str) else _work_of(out)


def _work_of(out: str) -> str:
    return f"{out.rstrip('/')}.work"


@click.command(cls=_BuildCommand)
@click.argument("source", metavar="IN")
@click.argument("out")
@click.option("--buckets", metavar="LIST",
              help="Sort images into buckets of these shapes, width to height: such as 2:3,1:1,3:2; default: nine from 1:2 to "
              "2:1; none. Of a stage's output `default` when absent, of a folder `none`.")  # fmt: skip
@click.option("--min-samples-of-a-bucket", "min_samples", type=click.IntRange(1), default=1000, show_default=True,
              help="Of a stage's output: the images of a smaller bucket go to the nearest that has enough; 1 for a small "
              "set.")  # fmt: skip
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
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the dataset at OUT, once the new one is whole. Where OUT.work is of other settings, or of an input that was "
    "mended since, or the dataset is not what it made, OUT.work is removed and the build begins anew; else it goes on.",
)
@stage_options_of_all_or_nothing
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
    """Build a dataset at OUT, a folder or a URL such as s3://bucket/photos, from the samples at IN.

    IN is the output of `loupe data ingest` or `faces`, a folder or a URL; any number of workers build it, and go on after
    they were stopped or killed. Or it is a local folder of images, which one process builds in --workers threads, from the
    start each time:

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
      loupe data build photos out/set --buckets default --dry-run
      loupe data build classes out/classes --max-samples 1000 --order-seed 0
      loupe data build s3://bucket/faces s3://bucket/set --captions s3://bucket/captions --workers 16
      loupe data build out/faces out/set --captions detailed=out/captions --columns out/latents --buckets 3:4,1:1,4:3
    """
    from data.commands.sources import check_stage
    from data.provenance import is_stage

    if is_stage(source):
        _refuse(_OF_FOLDERS, "is for folders of images; the images of a stage are kept as they are")
        _build_stage(source, out, buckets, min_samples, captions, columns, work, shard_mib, order_seed or 0, name, overwrite,
                     options)  # fmt: skip
        return
    if "://" in source or not Path(source).is_dir():
        check_stage(source, "IN")
    _refuse(_OF_STAGES, "is for the output of a stage; run `loupe data ingest` on the folder first")
    _build_folder(
        Path(source), out, buckets, size, image_format, quality, max_samples, shard_mib, order_seed, name, overwrite,
        options,
    )  # fmt: skip


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
    from data.buckets import parse_aspects
    from data.commands.begun import absolute
    from data.commands.built import show_built, show_expected
    from data.commands.sources import check_samples, check_stage, nothing_kept
    from data.mdsbuild.anew import begin_anew, note_inputs
    from data.mdsbuild.sidecars import Sidecar, parse_captions_option
    from data.mdsbuild.stage import BuildStage, check_place
    from data.stages.store import SUMMARY, StageStore
    from data.survey import survey_stage

    given = out
    source, out, work = absolute(source), absolute(out), absolute(work or _work_of(out))
    samples = check_samples(source)
    sidecars = tuple(replace(sidecar, url=absolute(sidecar.url)) for sidecar in map(parse_captions_option, captions))
    columns = tuple(map(absolute, columns))
    for option, urls in (("--captions", [sidecar.url for sidecar in sidecars]), ("--columns", columns)):
        for url in urls:
            check_stage(url, option)
            if option == "--captions" and nothing_kept(url):
                click.echo(
                    f"WARNING: --captions: {url} has no caption at all; look at `loupe data stats {url}`", err=True
                )
    stage = BuildStage(
        source,
        out,
        _name(out, name),
        parse_aspects(buckets or "default", option="--buckets"),
        shard_mib=shard_mib,
        order_seed=order_seed,
        min_samples=min_samples,
        captions=sidecars,
        columns=tuple(Sidecar(url) for url in columns),
        overwrite=overwrite,
    )
    inputs = [source, *(sidecar.url for sidecar in sidecars), *columns]
    anew = _unfit(stage, work, inputs)
    if anew:
        state = "is removed" if options.cluster == "local" and not options.dry_run else "will be removed"
        click.echo(f"{anew}; its state at {work} {state}, and it is built anew")
    check_place(stage, work, write=not options.dry_run)
    if options.dry_run:
        found = survey_stage(samples, stage.aspects)
        click.echo(f"  samples: {found.samples:,}, copies included")
        show_expected(found.by_bucket, stage.aspects, min_samples, exact=found.exact)
    elif options.cluster == "local":  # on a cluster each job comes here
        if anew:
            begin_anew(StageStore(work))
        note_inputs(StageStore(work), inputs)
    was_finished = StageStore(work).exists(SUMMARY)
    run(stage, work, options, begun_anew=anew is not None)
    if options.dry_run or options.cluster != "local":
        return
    made = StageStore(work).read_json(SUMMARY)["dataset"]
    show_built(given, made, min_samples)
    if was_finished and overwrite:
        click.echo(
            f"{given}: was built by this very command before, and has its digest and sizes; to build it anew all the same, "
            f"remove {work}"
        )
    click.echo(f"{work}: the build's state, which may be removed")


def _unfit(stage: "BuildStage", work: str, inputs: Sequence[str]) -> str | None:
    """Why a build's state is to be removed, so that it begins anew; None: it goes on, or there is none.

    Raises:
        UserError: it does not fit, and there is no --overwrite.
    """
    from data.commands.begun import check_begun
    from data.mdsbuild.anew import is_being_removed, why_not
    from data.stages.store import OtherSettings, StageStore
    from data.storage import Storage
    from trainer.errors import UserError

    store = StageStore(work)
    if is_being_removed(store):
        why: str | None = f"{work}: was being removed to build anew, and that was stopped"
    else:
        try:
            check_begun(stage, work)
        except OtherSettings as e:
            why = e.told
        else:
            why = why_not(store, Storage(stage.out), inputs)
    if why is not None and not stage.overwrite:
        raise UserError(
            f"{why}; add --overwrite to build anew (what is there stays until the new dataset is whole), or name another OUT"
        )
    return why


def _build_folder(
    source: Path, out: str, buckets: str | None, size: int | None, image_format: str, quality: int, max_samples: int | None,
    shard_mib: int, order_seed: int | None, name: str | None, overwrite: bool, options: StageOptions,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.markup import escape

    from data.buckets import parse_aspects
    from data.build import build as build_dataset
    from data.build import check_build
    from data.commands.built import show_built, show_expected
    from data.commands.shown import bar, count, show_list
    from data.schema import Resize
    from data.source import open_source
    from data.survey import survey_folder

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
    if options.dry_run:
        check_build(found, out, shard_mib, overwrite)
        expected = survey_folder(found, aspects, max_samples=max_samples)
        click.echo(f"build {source} into {out}, from {found.layout}")
        click.echo(f"  {count(expected.images, 'image')}, {expected.captioned:,} of them with a file and captions, "
                   f"{count(expected.captions, 'caption')}")  # fmt: skip
        click.echo(f"  samples: {expected.samples:,} at most, those that can be decoded")
        show_expected(expected.by_bucket, aspects, None, exact=expected.exact)
        _tell_no_row(found.no_row)
        return
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
            threads=max(options.workers, 1),
            progress=lambda: progress.advance(task),
        )
    show_built(out, built.told())
    click.echo(f"from {found.layout}")
    if built.info.class_names:
        click.echo(f"classes: {', '.join(built.info.class_names)}")
    if built.info.merged_rows:
        click.echo(f"merged: {count(built.info.merged_rows, 'row')} named an image again")
    _tell_no_row(found.no_row)
    for reason, number in built.info.rejected.items():
        click.echo(f"rejected: {count(number, 'image')}, {reason}")
    show_list([f"{r.file_name}: {r.reason}: {r.detail}" for r in built.rejected], f"{out}/rejected.jsonl")


def _tell_no_row(files: Sequence[str]) -> None:
    from data.commands.shown import count
    from data.source import METADATA

    if files:
        click.echo(
            f"no_row: {count(len(files), 'image file')} that {METADATA} has no row of, not used, such as {files[0]}"
        )
