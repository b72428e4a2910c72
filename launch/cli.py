"""The `loupe` command. A composition root: it may import anything, and does so only when a subcommand is used."""

import importlib
import inspect
import sys
import time
from datetime import datetime, timedelta

import click

from launch.entry import run_command
from trainer.errors import UserError, one_line

SUBCOMMANDS = {
    "submit": ("launch.slurm:main", "Train a recipe: on SLURM or on this machine."),
    "recipes": ("launch.cli:recipes", "The runs that are there to start from."),
    "runs": ("launch.cli:runs", "Look at runs: progress, state, where things are."),
    "data": ("data.cli:cli", "Build and inspect datasets."),
    "analyze": ("trainer.evaluate.analyze:cli", "Look into autoencoders: latents, decoder maps, gate."),
    "evaluate": ("trainer.evaluate.commands:cli", "Measure what an autoencoder gives back: PSNR, SSIM, LPIPS, ..."),
    "export": ("launch.cli:export", "Write a trained autoencoder, or latent network, as a folder that recipes load."),
    "experiment": ("launch.experiment:experiment", "Small experiments with a report, on a machine without a GPU."),
    "train": ("launch.cli:train", "Run one rank in this process; launchers do this for you."),
}
"""Name: (module:attribute, one line for `--help`, which must not import the module)."""


class LazyGroup(click.Group):
    """Imports a subcommand when it is used: `loupe --help` and `loupe submit` never import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        module, _, attribute = SUBCOMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"max_content_width": 120})
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


@click.group()
def runs() -> None:
    """Look at runs."""


@runs.command("watch")
@click.argument("run")
def watch_run(run: str) -> None:
    """Follow the run in folder RUN until it ends. Ctrl-C ends the watching only."""
    from launch.console import display_for, watch, where_things_are
    from launch.status import end_of

    folder = _existing(run)
    display = display_for()
    try:
        watch(folder, display, lambda: end_of(folder))
    except KeyboardInterrupt:
        display.note("no longer watching; the run goes on")
    for text in where_things_are(folder):
        display.note(text)
    display.close()


@runs.command("show")
@click.argument("run")
def show_run(run: str) -> None:
    """State, phase, step and restarts of the run in folder RUN."""
    from launch.console import losses, where_things_are
    from launch.status import status_of

    folder = _existing(run)
    status = status_of(folder)
    facts = {"run": status.name, "state": status.state}
    if status.last:
        age = timedelta(seconds=round(time.time() - status.last["time"]))
        facts |= {
            "phase": str(status.last["phase"]),
            "step": f"{status.last['step']} of {status.last['total_steps']}",
            "losses": losses(status.last),
            "speed": f"{status.last['images_per_s']:.1f} images/s",
            "last metrics": f"{datetime.fromtimestamp(status.last['time']):%Y-%m-%d %H:%M:%S} ({age} ago)",
        }
    facts["starts"] = str(status.starts)
    if status.restarts:
        facts["restarts"] = ", ".join(f"{reason} {count}" for reason, count in status.restarts.items())
    for name, fact in facts.items():
        click.echo(f"{name + ':':<14} {fact}")
    for text in where_things_are(folder):
        click.echo(text)


def _existing(run: str):  # type: ignore[no-untyped-def]  # RunFolder would import fsspec for `--help`
    from trainer.run_folder import CONFIG, RunFolder

    try:
        folder = RunFolder(run)
        found = folder.exists(CONFIG)
    except (ValueError, ImportError, OSError) as e:
        raise UserError(f"{run}: {one_line(e)}") from None
    if not found:
        raise UserError(f"{run}: no run there (no {CONFIG}); give a run folder such as runs/demo")
    return folder


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
