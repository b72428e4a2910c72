"""`loupe data ingest`."""

from pathlib import Path

import click

from data.commands.shown import told_ingest
from data.commands.stage import StageOptions, run, stage_options
from data.commands.watching import StageCommand

_LAYOUTS = ("auto", "tars", "manifest", "images", "metadata", "texts", "classes")


@click.command(cls=StageCommand)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("out")
@click.option(
    "--layout",
    type=click.Choice(_LAYOUTS),
    default="auto",
    show_default=True,
    help="What SOURCE is, where its name does not say it; images: any of the three that follow.",
)
@click.option("--url-column", help="Of a manifest; url when absent.")
@click.option("--caption-column", help="Of a manifest; caption or text when absent.")
@click.option("--licence-column", help="Of a manifest; licence or license when absent.")
@click.option(
    "--class-names",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the words of each class folder: a line of 'n01440764 tench', or JSON.",
)
@click.option("--min-side", type=click.IntRange(1), default=1, show_default=True, help="Shorter side, in pixels.")
@click.option("--max-aspect", type=click.FloatRange(1), help="Longer side over shorter.")
@click.option("--min-caption", type=click.IntRange(1), default=1, show_default=True, help="Characters of a caption.")
@click.option("--keep-uncaptioned", is_flag=True, help="Keep images without a caption, for recaption to describe.")
@click.option(
    "--max-image-mib", type=click.IntRange(1, 1024), default=64, show_default=True, help="Size of an image file."
)
@click.option(
    "--phash-distance",
    type=click.IntRange(0, 8),
    default=0,
    show_default=True,
    help="Bits of 64 in which perceptual hashes of copies may differ.",
)
@click.option("--keep-near-duplicates", is_flag=True, help="Drop only copies that are equal byte for byte.")
@click.option(
    "--per-host",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Requests at once to one host, of one worker.",
)
@click.option(
    "--connections",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests at once to all hosts, of one worker.",
)
@click.option("--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds of a request.")
@click.option("--attempts", type=click.IntRange(1, 10), default=3, show_default=True, help="Requests for an image.")
@click.option("--allow-private", is_flag=True, help="Fetch also from private addresses, such as a server of your own.")
@click.option("--allow-local", is_flag=True, help="Let a manifest name files of this machine.")
@click.option("--allow-object-stores", is_flag=True,
              help="Let a manifest name objects such as s3://..., which are read with your credentials.")  # fmt: skip
@stage_options
def ingest(
    sources: tuple[str, ...],
    out: str,
    layout: str,
    url_column: str | None,
    caption_column: str | None,
    licence_column: str | None,
    class_names: Path | None,
    min_side: int,
    max_aspect: float | None,
    min_caption: int,
    keep_uncaptioned: bool,
    max_image_mib: int,
    phash_distance: int,
    keep_near_duplicates: bool,
    per_host: int,
    connections: int,
    timeout: float,
    attempts: int,
    allow_private: bool,
    allow_local: bool,
    allow_object_stores: bool,
    options: StageOptions,
) -> None:
    """Bring the images of each SOURCE into shards of samples at OUT, a folder or a URL such as s3://bucket/ingested.

    A SOURCE is a path, an fsspec URL, or a pattern such as 's3://bucket/laion/**/*.tar', of one of:

    \b
    tars            WebDataset: KEY.jpg, KEY.txt, KEY.json (LAION, DataComp, img2dataset)
    manifests       .parquet or .jsonl, a row per image with its URL and caption
    images          a folder with metadata.jsonl, with a .txt beside each image, or
                    with a folder per class (ImageNet: give train/, or what holds it)

    Every image is decoded once; its bytes are kept as they are. What is not kept is counted by reason. Copies of an earlier
    image are left out: those that are equal byte for byte, and those with the same perceptual hash.

    Work goes by workers, here and on any number of machines, that are given the same command; one that is killed loses at
    most 1,000 samples, and the same command goes on.

    Examples:

    \b
      loupe data ingest photos runs/ingested
      loupe data ingest 's3://bucket/laion/*.tar' s3://bucket/ingested --min-side 256 --max-aspect 3
      loupe data ingest urls.parquet s3://bucket/ingested --caption-column alt --per-host 2
      loupe data ingest imagenet/train out --class-names words.txt --keep-near-duplicates
    """
    from data.commands.begun import absolute
    from data.ingest.class_names import read_class_names
    from data.ingest.examine import Filters
    from data.ingest.expand import check_sources, expand
    from data.ingest.from_urls import UrlOptions
    from data.ingest.manifests import Columns
    from data.ingest.stage import IngestStage
    from data.stages.store import STAGE, StageStore

    check_sources(sources, out)
    if not StageStore(out).exists(STAGE):
        expand(sources, layout)  # a name that is mistyped is told before the folder is bound to it
    stage = IngestStage(
        sources=[absolute(source) for source in sources],
        layout=layout,
        columns=Columns(url_column, caption_column, licence_column),
        filters=Filters(
            min_side, max_aspect, min_caption, keep_uncaptioned, max_image_mib, near_duplicates=not keep_near_duplicates
        ),
        urls=UrlOptions(per_host, connections, timeout, attempts, allow_private, allow_local, allow_object_stores),
        class_words=read_class_names(class_names) if class_names else {},
        distance=None if keep_near_duplicates else phash_distance,
    )
    run(stage, out, options, tell=told_ingest)
