"""What commands say, alike everywhere."""

from collections.abc import Mapping, Sequence
from typing import Any

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


def samples_line(samples: Mapping[str, int]) -> str:
    """What `ingest` has left for the next stage."""
    return f"kept {samples['kept']:,}, of them {samples['after_duplicates']:,} after duplicates"


def told_ingest(out: str, summary: Mapping[str, Any]) -> list[str]:
    return [f"{out}: {samples_line(summary['samples'])}"]


def told_faces(out: str, summary: Mapping[str, Any]) -> list[str]:
    found = summary["faces"]
    share = f"{found['images_blurred']:,} of {count(found['images'], 'image')} blurred ({found['blurred_share']:.1%})"
    lines = [f"{out}: {share}, {count(found['faces'], 'face')}"]
    return [*lines, f"look at {out.rstrip('/')}/{found['audit']} before you train"] if found["audit"] else lines
