"""`loupe data stats`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click


@click.command()
@click.argument("url", metavar="DATASET|STAGE_OUTPUT")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.option("--sample", type=click.IntRange(1), default=2000, show_default=True,
              help="Images to look at in a dataset that brings no statistics.")  # fmt: skip
@click.option("--shards", type=click.IntRange(1), default=500, show_default=True,
              help="Shards of a stage's output whose indexes are read.")  # fmt: skip
@click.option("--cache-dir", help="Folder for shards of a remote dataset; the system's cache folder when absent.")
def stats(url: str, as_json: bool, sample: int, shards: int, cache_dir: str | None) -> None:
    """What a dataset or a stage's output holds: samples, aspect buckets, resolutions, captions, licences, classes.

    Of what `loupe data build` has written the numbers are exact, counted as it was built; else they are of some samples, and
    that is said.

    Examples:

    \b
      loupe data stats runs/photos-data
      loupe data stats s3://bucket/ingested --json
    """
    from rich.console import Console

    from data.commands.sources import check_dataset
    from data.measure import Measured, measure_dataset, measure_stage
    from data.provenance import is_stage

    with Console(stderr=True).status("reading"):
        of_stage = is_stage(url)
        if not of_stage:
            check_dataset(url)
        found: Measured = (
            measure_stage(url, shards=shards) if of_stage else measure_dataset(url, sample=sample, cache_dir=cache_dir)
        )
    if as_json:
        click.echo(json.dumps(found.tree(), indent=1, ensure_ascii=False))
        return
    _show(found, Console())


def _show(found: Any, console: Any) -> None:
    from data.commands.shown import count
    from data.stats import SHAPES, SIDES, SIZES_KIB, WORDS, bin_names, shares

    def table(title: str, names: Sequence[str], counts: Sequence[int], *, trim: bool = False) -> None:
        rows = [(n, c, s) for n, c, s in zip(names, counts, shares(counts), strict=True)]
        if trim:
            filled = [i for i, count in enumerate(counts) if count]
            rows = rows[filled[0] : filled[-1] + 1] if filled else []
        if rows:
            _table(console, title, [(n, f"{c:,}", f"{s:.1%}") for n, c, s in rows])

    facts = [(name, text) for name, value in _facts(found) if (text := _fact(value))]
    _table(console, f"{found.kind} {found.url}", facts)
    if command := found.facts.get("command"):
        click.echo(f"begun with: {command}\n")
    for name, counts in found.counts.items():
        if counts:
            _table(console, f"pass {name}", [(reason, f"{number:,}") for reason, number in sorted(counts.items())])
    if found.buckets:
        _table(
            console,
            "aspect buckets",
            [(n, f"{samples:,}", count(shards, "shard")) for n, samples, shards in found.buckets],
        )
    stats = found.stats
    if stats is None:
        return
    if stats.of:
        _table(console, f"of {stats.samples:,} samples drawn from about {stats.of:,}:", [])
    table("shorter side, px", bin_names(SIDES), stats.short_sides, trim=True)
    table("width / height", bin_names(SHAPES), stats.shapes, trim=True)
    table("image files, KiB", bin_names(SIZES_KIB), stats.sizes_kib, trim=True)
    table("formats", list(stats.formats), list(stats.formats.values()))
    for kind, captions in stats.captions.items():
        title = f"captions, {kind}: {captions.texts:,} of {captions.samples:,} samples, words"
        table(title, bin_names(WORDS), captions.words, trim=True)
    table("licences", list(stats.licences), list(stats.licences.values()))
    table("classes", list(stats.classes), list(stats.classes.values()))


def _facts(found: Any) -> Iterator[tuple[str, Any]]:
    """A stage's settings one by one, by the names of the options that give them."""
    from data.commands.begun import shown_settings

    for name, value in found.facts.items():
        if name == "command":  # told by itself: a table would cut it
            continue
        if name == "settings":
            for key, one in value.items():
                yield from shown_settings(found.kind, key, one)
        elif name == "given_up":
            yield name, sum(map(len, value.values()))
        else:
            yield name, value


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(console: Any, title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(title)}", highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    if rows:
        console.print(table)
    console.print()
