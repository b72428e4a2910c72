"""`loupe plan`: what a run needs and takes, before anything is queued."""

import json
import os

import click

from trainer.errors import UserError


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("recipe")
@click.option("--gpus", type=click.IntRange(1, 65536), required=True, help="GPUs of the job.")
@click.option("--gpu", "kind", required=True, metavar="h100|h200|a100|b200", help="Which.")
@click.option("--gpus-per-node", type=click.IntRange(1, 72), default=8, help="That NVLink connects; of several nodes each has "
              "so many.")  # fmt: skip
@click.option("--network", metavar="GBIT", show_default=False,
              help="A GPU's share of the network between nodes, in Gbit/s.  [default: what is usual for the GPU]")  # fmt: skip
@click.option(
    "--price-per-gpu-hour", type=click.FloatRange(min=0), metavar="PRICE", help="For the cost, in your currency."
)
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Change a field. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON: bytes, seconds, operations.")
def plan(
    recipe: str, gpus: int, kind: str, gpus_per_node: int, network: str | None, price_per_gpu_hour: float | None,
    overrides: tuple[str, ...], as_json: bool,
) -> int:  # fmt: skip
    """Say what RECIPE, a recipe, a run's folder or a config.yaml, needs on these GPUs: memory by part, FLOPs, time of a step,
    MFU, images/s, loader, checkpoints, days and cost of each phase. Picks the sharding, recomputation and micro-batch that
    fit and are fastest by its reckoning; of them, what --set gives stays.

    Nothing is allocated, read or queued, and no GPU is needed; what is not there of the recipe's frozen networks is taken
    for the published ones. Ends with 1 where a phase does not fit. docs/scaling.md says what is assumed.

    \b
    Examples:
      loupe plan sd3_medium_512 --gpus 64 --gpu h100
      loupe plan imagenet_512_lpl --gpus 32 --gpu h200 --network 200 --price-per-gpu-hour 2.5
      loupe plan sd3_medium_512 --gpus 64 --gpu h100 --set parallel.activation_checkpointing=selective
      loupe plan finetune --gpus 8 --gpu a100 --set phases.0.batch_size=64
      loupe plan runs/first --gpus 128 --gpu b200 --json
    """
    from launch.job import load_config
    from trainer.plan.hardware import Cluster, find_gpu, network_gbit

    gpu = find_gpu(kind)
    cluster = Cluster(gpu, gpus, gpus_per_node, network_gbit(network) if network else gpu.nic_gbit_per_s)
    config = load_config(_config_file(recipe), overrides)

    from trainer.plan.choose import LAYOUT_FIELDS, layouts, make_plan
    from trainer.plan.recipe import count_recipe
    from trainer.plan.text import show, to_json

    changed = {override.partition("=")[0].strip() for override in overrides}
    held = [name for name in LAYOUT_FIELDS if {f"parallel.{name}", "parallel"} & changed]
    list(layouts(config, cluster, held))  # what it refuses, before seconds are spent on counting
    made = make_plan(config, count_recipe(config), cluster, price_per_gpu_hour, held)
    if as_json:
        click.echo(json.dumps(to_json(made), indent=2))
    else:
        from rich.console import Console

        show(made, Console())
    return 0 if made.fits else 1


def _config_file(recipe: str) -> str:
    """Of a run's folder, its config.yaml."""
    from trainer.recipes import RECIPES
    from trainer.run_folder import CONFIG

    if "://" in recipe or os.path.isdir(recipe):
        is_folder = recipe not in RECIPES and not recipe.endswith((".yaml", ".yml"))
        return f"{recipe.rstrip('/')}/{CONFIG}" if is_folder else recipe
    if "/" in recipe and not recipe.endswith((".yaml", ".yml")):
        raise UserError(f"{recipe}: no such folder, and no recipe either (`loupe recipes`)")
    return recipe
