"""`loupe experiment`: many small runs, what they are measured by, and a report. No torch: runs are processes of their own."""

import click

from launch.experiments.autoencoder import autoencoder
from launch.experiments.lpl import lpl


@click.group()
def experiment() -> None:
    """Experiments that a machine without a GPU can run."""


experiment.add_command(lpl)
experiment.add_command(autoencoder)
