"""What commands say, alike everywhere."""

from collections.abc import Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LISTED = 20
"""Rejected images or failures that are shown; all of them are counted."""


def bar(console: Console) -> Progress:
    # disabled where nobody watches: rich would leave an empty line there
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    console=console, transient=True, disable=not console.is_terminal)  # fmt: skip


def show_list(lines: Sequence[str], rest_in: str | None = None) -> None:
    for line in lines[:LISTED]:
        click.echo(f"  {line}")
    if len(lines) > LISTED:
        click.echo(f"  and {len(lines) - LISTED} more" + (f", see {rest_in}" if rest_in else ""))


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
