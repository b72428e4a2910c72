"""`loupe data faces`."""

from pathlib import Path

import click

from data.commands.shown import told_faces
from data.commands.stage import StageOptions, run, stage_options
from data.commands.watching import StageCommand


@click.command(cls=StageCommand)
@click.argument("source", metavar="IN")
@click.argument("out")
@click.option("--detector", default="yunet", show_default=True,
              help="yunet, or package.module:factory of your own: factory(weights, **options) gives a callable from an RGB "
              "image to rows of x, y, width, height, score.")  # fmt: skip
@click.option(
    "--weights", type=click.Path(path_type=Path, dir_okay=False), help="The detector's weights, a local file."
)
@click.option("--detector-option", "detector_options", multiple=True, metavar="NAME=VALUE",
              help="Of the detector, such as min_score=0.5; repeatable. Those of yunet are below.")  # fmt: skip
@click.option("--cells", type=click.IntRange(1, 64), default=3, show_default=True,
              help="Of a blurred face, across it; fewer leave less.")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0, 2), default=0.3, show_default=True,
              help="How far the blur reaches beyond a face, in its sides.")  # fmt: skip
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True,
              help="Of JPEG and WebP images that are encoded anew.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the faces in the audit grid.")
@stage_options
def faces(
    source: str,
    out: str,
    detector: str,
    weights: Path | None,
    detector_options: tuple[str, ...],
    cells: int,
    margin: float,
    quality: int,
    seed: int,
    options: StageOptions,
) -> None:
    """Find faces in the images of IN, the output of `loupe data ingest`, and blur them: samples as they go on are at OUT.

    Images without faces keep their bytes. The others are encoded anew: upright, in sRGB, without EXIF, whose thumbnail may
    show a face. Boxes and scores are kept beside them.

    \b
    options of yunet, with their defaults
    min_score=0.6           0 to 1; lower finds more faces, and more of what is none
    long_sides=[320,1024]   sizes that an image is searched at, 32 to 4096 pixels;
                            [320,1024,2048] finds small faces in large photos
    max_enlarge=1.0         small images are enlarged so much at most
    overlap=0.3             0 to 1; boxes that share more are one face

    OUT/audit.png shows blurred faces at random with their boxes, and OUT/summary.json how many images have some: look at
    both before you train. A detector misses faces, small and turned ones first.

    Examples:

    \b
      loupe data faces out/ingested out/blurred --weights face_detection_yunet_2023mar.onnx
      loupe data faces s3://bucket/ingested s3://bucket/blurred --weights yunet.onnx --detector-option min_score=0.5
      loupe data faces out/ingested out/blurred --detector mycompany.faces:Detector --weights faces.pt
    """
    from data.commands.begun import absolute
    from data.commands.sources import check_samples
    from data.faces.detect import detector_spec
    from data.faces.stage import Faces

    source = absolute(source)
    check_samples(source)  # before OUT is begun for it
    spec = detector_spec(detector, weights, detector_options)
    run(Faces(source, spec, cells=cells, margin=margin, quality=quality, seed=seed), out, options, tell=told_faces)
