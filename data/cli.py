"""`loupe data`: from raw images to a dataset. Each command is a module of data.commands, imported when it is used."""

import click

from launch.lazy_group import LazyGroup

COMMANDS = {
    "ingest": (
        "data.commands.ingest:ingest",
        "Images from tars, manifests of URLs or folders: filtered, counted, without duplicates.",
    ),
    "faces": ("data.commands.faces:faces", "Find and blur faces."),
    "recaption": ("data.commands.recaption:recaption", "Caption images anew with Florence-2."),
    "encode": ("data.commands.encode:encode", "Latents and text embeddings ahead of training."),
    "build": ("data.commands.build:build", "A dataset to train on."),
    "split": ("data.commands.split:split", "Datasets with images held out."),
    "index": ("data.commands.index:index", "Train on WebDataset tars as they are."),
    "verify": ("data.commands.verify:verify", "Every hash, count and image; repairs."),
    "stats": ("data.commands.stats:stats", "What a dataset holds."),
}
"""In the order in which one uses them."""


@click.group("data", cls=LazyGroup, lazy=COMMANDS)
def cli() -> None:
    """Make training data of images, stage by stage; each can be stopped, killed and run again, by many workers at once."""
