"""The `loupe` command. A composition root: it may import anything, and does so only when a subcommand is used."""

import inspect
import sys

import click

from launch.entry import run_command
from launch.lazy_group import LazyGroup

SUBCOMMANDS = {
    "submit": ("launch.slurm:main", "Train a recipe: on SLURM or on this machine."),
    "job": ("launch.slurm_job.command:job", "Queue any command on SLURM, such as an evaluation."),
    "recipes": ("launch.cli:recipes", "The runs that are there to start from."),
    "runs": ("launch.cli:runs", "A table of runs; show, logs, cancel, resume, export one."),
    "data": ("data.cli:cli", "Build and inspect datasets."),
    "doctor": ("launch.doctor.command:doctor", "Whether this machine and its storage are fit to train on."),
    "analyze": ("trainer.evaluate.analyze:cli", "Look into autoencoders: latents, decoder maps, gate."),
    "evaluate": ("trainer.evaluate.commands:cli", "Measure what an autoencoder gives back: PSNR, SSIM, LPIPS, ..."),
    "export": ("launch.cli:export", "Write a trained autoencoder, or latent network, as a folder that recipes load."),
    "experiment": (
        "launch.experiments.command:experiment",
        "Small experiments with a report, on a machine without a GPU.",
    ),
    "train": ("launch.cli:train", "Run one rank in this process; launchers do this for you."),
    "pod": ("launch.pods.task:pod", "Run a Kubernetes pod's ranks; its manifest does this for you."),
}
"""As `LazyGroup` has them: `loupe --help` and `loupe submit` never import torch."""


@click.group(cls=LazyGroup, lazy=SUBCOMMANDS, context_settings={"max_content_width": 120})
@click.version_option(package_name="loupe")
def cli() -> None:
    """Loupe: distributed training of text-to-image latent diffusion with the latent perceptual loss."""


# -------------------------------------------------------------------------------------------------------------- recipes


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the recipes, or show one."""
    if ctx.invoked_subcommand is None:
        from trainer.recipes import RECIPES

        width = max(map(len, RECIPES))
        for name, recipe in RECIPES.items():
            click.echo(f"{name:<{width}}  {(inspect.getdoc(recipe) or '').partition(chr(10))[0]}")


@recipes.command("show")
@click.argument("name")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field. Repeatable.")
def show_recipe(name: str, overrides: tuple[str, ...]) -> None:
    """Print the whole config of NAME, a recipe or a config.yaml, as YAML."""
    from launch.job import load_config
    from trainer.config_text import to_yaml

    click.echo(to_yaml(load_config(name, overrides)), nl=False)


# ----------------------------------------------------------------------------------------------------------------- runs


RUNS = {
    "list": ("launch.runs.list:list_runs", "A table of the runs below a folder; what `loupe runs` alone does."),
    "show": ("launch.runs.show:show_run", "One run: progress, restarts, checkpoints, where things are."),
    "watch": ("launch.runs.watch:watch_run", "Follow a run's progress until it ends."),
    "logs": ("launch.runs.logs:logs", "What all ranks have said, followed."),
    "cancel": ("launch.runs.cancel:cancel", "Save and end, without coming back; or end at once."),
    "resume": ("launch.runs.resume:resume", "Submit again, as it was submitted."),
    "export": ("launch.cli:export", "Write what it has trained as a folder; as `loupe export`."),
}


class RunsGroup(LazyGroup):
    """`loupe runs` and its options are those of `loupe runs list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx)):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=RunsGroup, lazy=RUNS)
def runs() -> None:
    """Look at runs, stop them, go on with them. A run is named by its folder, its URL, or its name below a root
    (--root, $LOUPE_RUNS, or ./runs).

    \b
    Examples:
      loupe runs
      loupe runs --root s3://bucket/runs --all
      loupe runs show demo
      loupe runs logs demo --follow
      loupe runs cancel demo
      loupe runs resume demo --nodes 4
      loupe runs export runs/my-autoencoder models/mine
    """


# --------------------------------------------------------------------------------------------------------------- export


@click.command(context_settings={"show_default": True})
@click.argument("run")
@click.argument("out")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the written weights.")
@click.option(
    "--scale-of",
    metavar="URL",
    show_default=False,
    help="An autoencoder whose scale and shift to write, where OUT shares its latents; else the run's own data give them, or, "
    "where the decoder alone was trained, the autoencoder that it began with.",
)
def export(run: str, out: str, dtype: str, scale_of: str | None) -> None:
    """Write what RUN has trained, averaged, to folder OUT.

    Of an autoencoder, with the scale and shift of its latents: OUT can then be a recipe's `task.codec.url`, and diffusers'
    `AutoencoderKL`, `AsymmetricAutoencoderKL` or `VQModel` loads it with `from_pretrained`. That is done here, too: where its
    outputs are not those of what was trained, nothing is written. `psnr_db` is on images of the run's own data, `difference`
    the largest between diffusers' outputs and the trained module's; OUT/latents.json has mean and deviation of each channel.

    Of a latent network: OUT can then be a recipe's `task.perceptual.url`.

    \b
    Examples:
      loupe export runs/my-autoencoder exports/my-autoencoder
      loupe export runs/my-autoencoder exports/my-autoencoder-fp32 --dtype float32
      loupe export runs/light-decoder exports/light-decoder --scale-of models/sd-vae
    """
    import torch

    from trainer.export import export_run, usage

    measured = export_run(run, out, dtype=getattr(torch, dtype), scale_of=scale_of)
    click.echo(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    for line in usage(run, out):
        click.echo(line)


# ---------------------------------------------------------------------------------------------------------------- train


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> int:
    """One rank: `python -m trainer.train`, with the same arguments."""
    from trainer.train import main as train_main

    return train_main(list(arguments))


# --------------------------------------------------------------------------------------------------------- entry point


def main() -> int:
    """Console entry point."""
    return run_command(cli, prog_name="loupe")


if __name__ == "__main__":
    sys.exit(main())
