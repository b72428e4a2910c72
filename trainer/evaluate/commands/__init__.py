"""`loupe evaluate`: how good a trained network is, and what it makes."""

import click

from trainer.evaluate.commands.autoencoder import autoencoder
from trainer.evaluate.commands.images import images
from trainer.evaluate.commands.run import run


@click.group("evaluate")
def cli() -> None:
    """Measure trained networks, and images."""


for command in (images, run, autoencoder):
    cli.add_command(command)
