"""`loupe export`: what a run has trained, as a folder that others load."""

from typing import Any

import click

DTYPES = ("float16", "bfloat16", "float32")


@click.command(context_settings={"show_default": True})
@click.argument("run")
@click.argument("out")
@click.option(
    "--root", "roots", multiple=True, metavar="URL", show_default=False,
    help="Where RUN is looked for.  [default: $LOUPE_RUNS, or runs]",
)  # fmt: skip
@click.option(
    "--format", "form", type=click.Choice(["diffusers", "safetensors"]), default="diffusers",
    help="diffusers: a folder that it opens. safetensors: the weights by our own names, and the config.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="float16", help="Of the written weights.")
@click.option(
    "--weights", default="ema", metavar="ema|raw|ema:SIGMA",
    help="The average; those of the last step; or, of a run with EMA profiles, an average of another width.",
)  # fmt: skip
@click.option(
    "--push", metavar="URL", show_default=False,
    help="Copy OUT there as well: any fsspec URL, such as s3://bucket/models/mine. OUT itself may be one, too.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["auto", "sd3", "custom"]), default="auto",
    help="Of a pipeline. auto: StableDiffusion3Pipeline's where the run is of its kind, else one with its own code.",
)  # fmt: skip
@click.option(
    "--without-text-encoders",
    is_flag=True,
    show_default=False,
    help="Leave frozen text encoders out; README.md says how to add them.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    show_default=False,
    help="Of the pictures that are compared and shown. Repeatable.",
)
@click.option("--pictures", type=click.IntRange(1, 64), default=8, help="That are compared and shown.")
@click.option(
    "--steps", type=click.IntRange(1, 1000), show_default=False, help="Of those pictures.  [default: the run's own]"
)
@click.option(
    "--licence", metavar="NAME", show_default=False, help="Of the weights, for the model card, such as apache-2.0."
)
@click.option(
    "--scale-of", metavar="URL", show_default=False,
    help="Of an autoencoder's run: another one whose scale and shift to write, where OUT shares its latents; else the run's "
    "own data give them, or, where the decoder alone was trained, the autoencoder that it began with.",
)  # fmt: skip
def export(run: str, out: str, roots: tuple[str, ...], form: str, dtype: str, push: str | None, **options: Any) -> None:
    """Write what RUN has trained, averaged, to OUT, a folder or any fsspec URL. RUN: a run folder, its URL, or its name below a
    root; or one of its checkpoints. OUT appears whole or not at all, and replaces an earlier export alone.

    Of latent diffusion: a pipeline that diffusers opens, with a model card. It is made to draw the run's own pictures in a
    process that has diffusers and not this package: where a pixel is more than 1/255 off, nothing is written.

    Of an autoencoder, with the scale and shift of its latents: OUT can then be a recipe's `task.codec.url`, and diffusers'
    `AutoencoderKL`, `AsymmetricAutoencoderKL` or `VQModel` loads it with `from_pretrained`. That is done here, too: where its
    outputs are not those of what was trained, nothing is written. `psnr_db` is on images of the run's own data, `difference`
    the largest between diffusers' outputs and the trained module's; OUT/latents.json has mean and deviation of each channel.

    Of a latent network: OUT can then be a recipe's `task.perceptual.url`.

    \b
    Examples:
      loupe export runs/demo exports/demo
      loupe export runs/demo exports/demo --dtype float32 --push s3://bucket/models/demo
      loupe export runs/sd3 s3://bucket/models/sd3 --without-text-encoders --licence apache-2.0
      loupe export runs/demo exports/demo-weights --format safetensors --weights raw
      loupe export runs/my-autoencoder exports/my-autoencoder
      loupe export runs/light-decoder exports/light-decoder --scale-of models/sd-vae
    """
    from trainer.run_names import run_or_checkpoint

    source = run_or_checkpoint(run, roots)
    _check(source, form, options)  # before what takes seconds to import
    from trainer.export.run import push_export
    from trainer.export.target import free_target

    if push:
        free_target(push)
    if form == "safetensors":
        _weights(source, out, dtype, options)
    else:
        _folder(source, out, dtype, options)
    if push:
        push_export(out, push)
        click.echo(f"copied to {push}")


def _check(source: str, form: str, options: dict[str, Any]) -> None:
    """What the run's config alone tells of the options."""
    from trainer.config import LatentDiffusionConfig
    from trainer.sampling.source import check_weights, opened

    task = opened(source).config.task
    check_weights(options["weights"])
    if form == "safetensors":
        return
    if not isinstance(task, LatentDiffusionConfig):
        if options["weights"] != "ema":
            raise click.UsageError(f"--weights: of a run of {task.kind} the average is exported; leave it out")
    elif options["scale_of"]:
        raise click.UsageError("--scale-of: is about an autoencoder's latents; leave it out")


def _weights(source: str, out: str, dtype: str, options: dict[str, Any]) -> None:
    import torch

    from trainer.export.weights_file import export_weights

    done = export_weights(source, out, dtype=getattr(torch, dtype), weights=options["weights"])
    click.echo(f"{out}: {done.tensors} tensors of step {done.step}, {done.bytes / 1e6:.1f} MB")
    click.echo(f"to begin a run with them: --set 'init_from={{url: {out}}}'")


def _folder(source: str, out: str, dtype: str, options: dict[str, Any]) -> None:
    import torch

    from trainer.config import LatentDiffusionConfig
    from trainer.export.latent_diffusion import export_latent_diffusion
    from trainer.export.run import export_run, usage
    from trainer.sampling.job import pictures
    from trainer.sampling.source import opened

    kind, task = getattr(torch, dtype), opened(source).config.task
    if not isinstance(task, LatentDiffusionConfig):
        measured = export_run(source, out, dtype=kind, scale_of=options["scale_of"])
        click.echo(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        for line in usage(source, out):
            click.echo(line)
        return
    done = export_latent_diffusion(
        source, out, dtype=kind, weights=options["weights"], layout=options["layout"],
        without_text_encoders=options["without_text_encoders"], prompts=options["prompts"], pictures=options["pictures"],
        steps=options["steps"], licence=options["licence"],
    )  # fmt: skip
    which = done.pipeline or f"a pipeline with its own code ({done.why_not_sd3[0]})"
    parity = done.parity
    click.echo(f"{out}: {which}, step {done.step}")
    click.echo(
        f"diffusers drew {pictures(parity.pictures)} of {parity.settings.steps} steps as the run does: largest difference "
        f"{parity.largest}/255, {parity.differing:.3%} of the values differ"
    )
    for note in done.notes:
        click.echo(f"note: {note}")
    click.echo(f"\n{done.usage}")
