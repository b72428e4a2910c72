"""What `loupe data build` prints of aspect buckets and of a dataset's card."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from data.commands.shown import count


def show_built(out: str, made: Mapping[str, Any], min_samples: int | None = None) -> None:
    """
    Args:
        made: `samples`, `shards`, `bytes`, `digest`; `buckets` of `name`, `samples` and `num_shards`; `merged_buckets`, lines;
            `files` of the card.
        min_samples: of a bucket, where small ones are merged.
    """
    from data.mdsbuild.plan import SMALLEST_SHARE

    click.echo(
        f"{out}: {count(made['samples'], 'sample')} in {count(made['shards'], 'shard')}, {made['bytes'] / 1e6:.2f} MB, "
        f"digest {made['digest']}"
    )
    for bucket in made["buckets"]:
        click.echo(
            f"  bucket {bucket['name']}: {count(bucket['samples'], 'sample')} in {count(bucket['num_shards'], 'shard')}"
        )
    if merged := made.get("merged_buckets"):
        assert min_samples is not None
        least = math.ceil(made["samples"] * SMALLEST_SHARE)
        why = f"fewer than {min_samples:,} samples (--min-samples-of-a-bucket)"
        mend = "build anew with a smaller number to keep them apart"
        if least > min_samples:
            why, mend = f"fewer than {least:,} samples, {SMALLEST_SHARE:.2%} of all", "give --buckets without them"
        click.echo(f"WARNING: buckets with {why} were merged into the nearest: {'; '.join(merged)}; {mend}")
    show_card(out, made["files"])


def show_card(out: str, files: Iterable[str]) -> None:
    click.echo("look at " + ", ".join(f"{out.rstrip('/')}/{name}" for name in files))


def show_expected(
    by_bucket: Mapping[str, int], aspects: Mapping[str, float], min_samples: int | None, *, exact: bool
) -> None:
    """On a dry run: buckets that would come out, and which of them would be merged away."""
    if not aspects:
        click.echo("  buckets: none")
        return
    about = "" if exact else "about "
    found = {name: number for name, number in by_bucket.items() if number}
    click.echo(
        "  buckets: " + (", ".join(f"{name} {about}{number:,}" for name, number in found.items()) or "no samples")
    )
    if min_samples is None or not found:
        return
    for line in _merged(list(aspects), by_bucket, aspects, min_samples):
        click.echo(f"  WARNING: {line}")


def _merged(
    names: Sequence[str], by_bucket: Mapping[str, int], aspects: Mapping[str, float], min_samples: int
) -> list[str]:
    from data.mdsbuild.plan import join_small

    joined = join_small(aspects, [by_bucket[name] for name in names], min_samples)
    lost = [f"{names[b]} into {names[to]}" for b, to in joined.items() if b != to and by_bucket[names[b]]]
    if not lost:
        return []
    return [
        f"--min-samples-of-a-bucket {min_samples:,}: smaller buckets would be merged, {', '.join(lost)}; give a smaller "
        "number to keep them apart"
    ]
