"""The `loupe` command. A composition root: it may import anything, and does so only when a subcommand is used."""

import inspect
import sys

import click

from launch.entry import run_command
from launch.lazy_group import LazyGroup

SUBCOMMANDS = {
    "submit": ("launch.slurm:main", "Train a recipe: on SLURM or on this machine."),
    "k8s": ("launch.k8s:main", "Train a recipe on Kubernetes."),
    "job": ("launch.slurm_job.command:job", "Queue any command on SLURM, such as an evaluation."),
    "recipes": ("launch.cli:recipes", "The runs that are there to start from."),
    "plan": ("launch.commands.plan:plan", "What a recipe needs on so many GPUs: memory, time, cost. Queues nothing."),
    "runs": ("launch.cli:runs", "A table of runs; show, logs, cancel, resume, export one."),
    "data": ("data.cli:cli", "Build and inspect datasets."),
    "doctor": ("launch.doctor.command:doctor", "Whether this machine and its storage are fit to train on."),
    "discovery": (
        "launch.discovery.command:discovery",
        "How Prometheus finds runs: a server, scrape configs, stale files.",
    ),
    "sample": ("launch.commands.sample:sample", "Draw pictures with a trained model."),
    "gallery": ("launch.commands.gallery:gallery", "A page that draws with one or two runs, also while they train."),
    "analyze": ("trainer.evaluate.analyze:cli", "Look into autoencoders: latents, decoder maps, gate."),
    "evaluate": (
        "trainer.evaluate.commands:cli",
        "Measure a model's pictures (FID, ...), or what an autoencoder gives back.",
    ),
    "export": (
        "launch.commands.export:export",
        "Write a trained model as a diffusers pipeline or safetensors, or an autoencoder that recipes load.",
    ),
    "checkpoint": ("launch.commands.checkpoint:checkpoint", "List, verify, convert, compare and delete checkpoints."),
    "ema": ("launch.commands.ema:ema", "Averages of other widths, made after the training."),
    "experiment": (
        "launch.experiments.command:experiment",
        "Experiments with a report, small or at a paper's size.",
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
    """Print the whole config of NAME, a recipe or a config.yaml, as YAML.

    \b
    Examples:
      loupe recipes show demo
      loupe recipes show demo --set phases.0.batch_size=64 > mine.yaml
      loupe recipes show runs/demo/config.yaml
    """
    from launch.job import load_config
    from trainer.config_text import to_yaml

    click.echo(to_yaml(load_config(name, overrides)), nl=False)


# ----------------------------------------------------------------------------------------------------------------- runs


RUNS = {
    "list": ("launch.runs.list:list_runs", "A table of the runs below a folder; what `loupe runs` alone does."),
    "show": ("launch.runs.show:show_run", "One run: progress, restarts, checkpoints, where things are."),
    "watch": ("launch.runs.watch:watch_run", "Follow a run's progress until it ends."),
    "logs": ("launch.runs.logs:logs", "What all ranks have said, followed."),
    "report": ("launch.report.command:report", "One HTML file about a run, also live; or several side by side."),
    "cancel": ("launch.runs.cancel:cancel", "Save and end, without coming back; or end at once."),
    "resume": ("launch.runs.resume:resume", "Submit again, as it was submitted."),
    "export": ("launch.commands.export:export", "Write what it has trained as a folder; as `loupe export`."),
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
      loupe runs report demo --open
      loupe runs cancel demo
      loupe runs resume demo --nodes 4
      loupe runs export runs/my-autoencoder models/mine
    """


# ---------------------------------------------------------------------------------------------------------------- train


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="--config FILE --run-dir PATH|URL")
def train(arguments: tuple[str, ...]) -> int:
    """Run one rank of a training in this process, as torchrun or a scheduler of yours starts it: rank and world size come
    from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them it is the only rank.

    It saves and ends with 75 upon SIGTERM, and is not started again by itself: `loupe submit` does that.

    \b
    Examples:
      loupe train --config config.yaml --run-dir runs/first
      torchrun --nproc-per-node 8 -m launch.cli train --config config.yaml --run-dir s3://bucket/runs/first
    """
    from trainer.train import main as train_main

    return train_main(list(arguments))


# --------------------------------------------------------------------------------------------------------- entry point


def main() -> int:
    """Console entry point."""
    return run_command(cli, prog_name="loupe")


if __name__ == "__main__":
    sys.exit(main())
