"""`loupe experiment`: many small runs, what they are measured by, and a report. No torch: runs are processes of their own."""

import click

from launch.experiments.autoencoder import autoencoder
from launch.experiments.lpl import lpl
from launch.experiments.paper import commands, paper


@click.group()
def experiment() -> None:
    """The paper's tables and figures, and experiments that a machine without a GPU can run."""


experiment.add_command(lpl)
experiment.add_command(autoencoder)
experiment.add_command(paper)
for command in commands():
    experiment.add_command(command)
