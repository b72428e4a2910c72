"""`loupe data encode`."""

import os
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from data.commands.stage import StageOptions, run, stage_options_of_all_or_nothing
from data.commands.watching import StageCommand


@click.command(cls=StageCommand)
@click.argument("source", metavar="IN")
@click.argument("out")
@click.option(
    "--codec", metavar="URL", help="Autoencoder whose latents to store: a folder as `task.codec.url` names it."
)
@click.option("--latents", type=click.Choice(["mean", "moments"]), default="mean", show_default=True,
              help="The posterior's mean, as a run takes; or mean and variance, to draw from at each use.")  # fmt: skip
@click.option("--resolution", type=click.IntRange(8, 8192), default=256, show_default=True,
              help="Side of the images in pixels; of buckets, of the square of equal area.")  # fmt: skip
@click.option("--buckets", metavar="LIST", help="Aspect buckets instead of squares, the same as the build's: default, none, "
              "or width:height, ... such as 3:4,1:1,4:3.")  # fmt: skip
@click.option("--patch", type=click.IntRange(1, 64), default=2, show_default=True,
              help="Sides of a bucket's latents are multiples of this: the denoiser's patch.")  # fmt: skip
@click.option("--text", "text", multiple=True, metavar="ENCODER",
              help="Frozen text encoder whose states to store: YAML with the fields of `task.text` or of one of its encoders, "
              "or a file of it. Repeatable.")  # fmt: skip
@click.option("--captions", multiple=True, metavar="URL",
              help="Output of `loupe data recaption`, whose captions are encoded as well. Repeatable.")  # fmt: skip
@click.option("--captions-per-kind", type=click.IntRange(1),
              help="Encode the first so many captions of each kind; all when absent.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True,
              help="Of what is stored. A value too large for it ends the item.")  # fmt: skip
@click.option("--decode", type=click.Choice(["fast", "balanced", "exact"]), default="balanced", show_default=True,
              help="How larger JPEGs are shrunk, as `data.decode` has it; exact: averages of the full image.")  # fmt: skip
@click.option("--name", default="latents", show_default=True, help="Column of the latents.")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=16, show_default=True, help="Images at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@stage_options_of_all_or_nothing
def encode(
    source: str,
    out: str,
    codec: str | None,
    latents: str,
    resolution: int,
    buckets: str | None,
    patch: int,
    text: tuple[str, ...],
    captions: tuple[str, ...],
    captions_per_kind: int | None,
    dtype: str,
    decode: str,
    name: str,
    batch_size: int,
    device: str,
    options: StageOptions,
) -> None:
    """Encode images, captions or both of IN, the output of `ingest` or `faces`, by frozen networks: columns for a dataset.

    Training then runs neither the autoencoder's encoder nor, for captions that are stored, the text encoder. Latents are of
    the centre crop: a run that trains on them has no random crops and no flips, and must have the same autoencoder.

    \b
    bytes a sample in float16   256 px    512 px
    latents, 4 channels        8 KB     32 KB      moments: twice that
    latents, 16 channels      32 KB    128 KB      more than the JPEG
    text, a caption           CLIP-L 118 KB, T5-XXL of 120 tokens at most 0.98 MB

    Give OUT to `loupe data build --columns`; a run names the column in data.latents, or data.text_states. The states of
    the i-th encoder are the column text_i.

    Examples:

    \b
      loupe data encode out/blurred out/latents --codec models/sdxl-vae --resolution 256
      loupe data encode s3://bucket/blurred s3://bucket/latents --codec s3://bucket/sd3-vae --resolution 512 \\
          --latents moments --dtype bfloat16 --buckets default --device cuda
      loupe data encode out/blurred out/text --text '{family: clip, url: models/clip-l, width: 768, pooled_width: 768}'
    """
    from data.commands.begun import absolute
    from data.commands.sources import check_samples, check_stage
    from data.encode.stage import Encode
    from trainer.errors import UserError

    source, captions = absolute(source), tuple(map(absolute, captions))
    codec = absolute(codec) if codec and os.path.isdir(codec) else codec
    check_samples(source)  # before networks are loaded and OUT is begun for it
    for url in captions:
        check_stage(url, "--captions")
    if not codec and not text:
        raise UserError("--codec: give an autoencoder, a text encoder with --text, or both")
    options = _placed(options, device)
    threads = max(1, len(os.sched_getaffinity(0)) // max(options.workers, 1))
    jobs: dict[str, Any] = {}
    if codec:
        jobs["latents"] = {
            name: _latents_job(codec, latents, resolution, buckets, patch, dtype, decode, batch_size, device, threads)
        }
    if text:
        jobs["text"] = _text_jobs(text, captions_per_kind, dtype, device, threads)
    run(Encode(source, captions=captions, **jobs), out, options)


def _placed(options: StageOptions, device: str) -> StageOptions:
    """One worker a GPU, unless a number was given: cores are no measure there."""
    from trainer.evaluate.codec_report import choose_device

    given = click.get_current_context().get_parameter_source("workers") is not ParameterSource.DEFAULT
    if given or choose_device(device).type != "cuda":
        return options
    import torch

    return replace(options, workers=torch.cuda.device_count() if device in ("auto", "cuda") else 1)


def _latents_job(
    url: str, holds: Any, resolution: int, buckets: str | None, patch: int, dtype: Any, decode: Any, batch_size: int,
    device: str, num_threads: int,
) -> Any:  # fmt: skip
    from data.buckets import parse_aspects, shape_of
    from data.encode.stage import LatentsJob
    from trainer.models.autoencoders import Codec
    from trainer.precompute import LoadCodec, latents_column
    from trainer.urls import public_url

    aspects = parse_aspects(buckets or "none", option="--buckets")
    codec = Codec.load(url)
    shapes: dict[str, tuple[int, int]] = {}
    if aspects:
        _check_multiple(resolution, codec.downsampling * patch)
        shapes = {name: shape_of(aspect, resolution, codec.downsampling * patch) for name, aspect in aspects.items()}
    column = latents_column(
        codec, public_url(url), holds=holds, dtype=dtype, resolution=resolution, buckets=shapes, decode=decode
    )  # fmt: skip
    return LatentsJob(column, LoadCodec(url, holds, column.revision, device, num_threads), batch_size, aspects)


def _text_jobs(
    given: tuple[str, ...], captions_per_kind: int | None, dtype: Any, device: str, num_threads: int
) -> dict[str, Any]:
    from data.encode.stage import TextJob
    from trainer.precompute import LoadText, text_column, text_encoders, text_revision
    from trainer.urls import public_url

    jobs: dict[str, Any] = {}
    for config in (config for words in given for config in text_encoders(words)):
        revision = text_revision(config, "--text")
        column = text_column(
            config, public_url(config.url), dtype=dtype, captions_per_kind=captions_per_kind, revision=revision
        )  # fmt: skip
        jobs[f"text_{len(jobs)}"] = TextJob(column, LoadText(config, revision, device=device, num_threads=num_threads))
    return jobs


def _check_multiple(resolution: int, multiple: int) -> None:
    from trainer.errors import UserError

    if resolution % multiple:
        below = resolution // multiple * multiple
        raise UserError(f"--resolution: {resolution} px is no multiple of {multiple}, the autoencoder's downsampling times "
                        f"--patch; take {below or multiple} or {below + multiple}")  # fmt: skip
