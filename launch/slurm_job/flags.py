"""Options of the commands that queue on SLURM, for those that mean the same in each. No torch."""

from collections.abc import Callable
from typing import Any

import click

from launch.option_groups import option
from launch.slurm_job.options import RUNTIMES

Decorator = Callable[..., Any]


def together(*options: Decorator) -> Decorator:
    """Several as one, in this order in `--help`."""

    def decorate(command: Any) -> Any:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


def queue_options(group: str, *, limit: str) -> Decorator:
    """`partition`, `account`, `qos`, `time_limit`, `constraint`, `exclude`.

    Args:
        limit: help of --time.
    """
    return together(
        option(group, "--partition", help="Partition."),
        option(group, "--account", help="Account."),
        option(group, "--qos", help="Quality of service."),
        option(group, "--time", "time_limit", metavar="TIME", help=limit),
        option(group, "--constraint", help="Features that nodes must have."),
        option(group, "--exclude", help="Nodes to avoid."),
    )


def container_options(group: str, *, run: str, mounted: str) -> Decorator:
    """`image`, `container_runtime`, `mounts`, `container_python`, as `container_of` takes them.

    Args:
        run: what runs in it.
        mounted: what is there without being asked for.
    """
    return together(
        option(group, "--container", "image", metavar="IMAGE", help=f"Run {run} in it; a file, or a name."),
        option(group, "--container-runtime", type=click.Choice(RUNTIMES), default="pyxis",
               help="Pyxis with enroot, as srun has it, or apptainer."),
        option(group, "--container-mount", "mounts", multiple=True, metavar="SRC[:DST[:ro]]",
               help=f"Besides {mounted}, which are mounted anyway. Repeatable."),
        option(group, "--container-python", default="python", metavar="COMMAND", help="The image's."),
    )  # fmt: skip


def include_option(group: str) -> Decorator:
    """`includes`."""
    return option(group, "--include", "includes", multiple=True, metavar="FILE|FOLDER",
                  help="Of the checkout, into that copy too, though git does not know it. Repeatable.")  # fmt: skip


def env_option(group: str, whose: str) -> Decorator:
    """`env`."""
    return option(group, "--env", "env", multiple=True, metavar="NAME=VALUE",
                  help=f"Into {whose}; not for secrets, which the shell exports. Repeatable.")  # fmt: skip


def after_option(group: str) -> Decorator:
    """`after`."""
    return option(group, "--after", multiple=True, metavar="[any:]JOB",
                  help="Start when JOB has succeeded; with any:, however it ends. Repeatable.")  # fmt: skip
