"""`loupe data`: from raw images to a dataset. Each command is a module of data.commands, imported when it is used."""

import importlib

import click

COMMANDS = {
    "ingest": "Images from tars, manifests of URLs or folders: filtered, counted, without duplicates.",
    "faces": "Find and blur faces.",
    "recaption": "Caption images anew with Florence-2.",
    "encode": "Latents and text embeddings ahead of training.",
    "build": "A dataset to train on.",
    "split": "Datasets with images held out.",
    "index": "Train on WebDataset tars as they are.",
    "verify": "Every hash, count and image; repairs.",
    "stats": "What a dataset holds.",
}
"""In the order in which one uses them."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"data.commands.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group("data", cls=_LazyGroup)
def cli() -> None:
    """Make training data of images, stage by stage; each can be stopped, killed and run again, by many workers at once."""
