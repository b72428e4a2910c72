"""The second pass: which samples stand in which shard of the dataset, from the windows' sizes alone.

A bucket's samples follow one another window by window. That row is cut into shards of about equal bytes, as many as the size
of a shard asks for, so there are no remainders. In memory are a few numbers for each shard and window, and no sample.
"""

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.ahead import in_order
from data.mdsbuild.windows import FETCHERS, SIZES
from data.schema import LABELS
from data.stages.receipts import done_receipts, sum_counts
from data.stages.runner import Part, Work
from data.stages.samples import fetch
from data.stages.store import Json, StageStore
from data.stats import Statistics
from trainer.errors import UserError

WINDOWS, PLAN = "windows", "plan"
"""Passes."""
MAX_CLASSES = 1 << 20
MAX_WINDOW_BYTES = 1 << 30
SMALLEST_SHARE = 1e-4
"""Of the dataset, for a bucket of its own."""


class Piece(NamedTuple):
    """Samples `start` to `stop - 1` of a window's bucket."""

    window: int
    bucket: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """All shards. As arrays: there may be half a million."""

    pieces: NDArray[np.int64]
    """(number, 4): `Piece`s, in the order of the shards."""
    ends: NDArray[np.int64]
    """Pieces up to and including each shard's."""
    about: dict[str, Json]

    @property
    def num_shards(self) -> int:
        return len(self.ends)

    def of_shard(self, shard: int) -> list[Piece]:
        first = int(self.ends[shard - 1]) if shard else 0
        return [Piece(*map(int, row)) for row in self.pieces[first : int(self.ends[shard])]]


def plan_items(store: StageStore) -> list[Json]:
    return [{"name": "plan"}]


def read_plan(store: StageStore, scratch: Path) -> Plan:
    """What `plan_parts` has written."""
    files = store.read_json(f"work/{PLAN}/done/plan.json")["parts"][0]["files"]
    shards = fetch(store, files["shards"], scratch / "plan.npz", MAX_WINDOW_BYTES)
    about = fetch(store, files["about"], scratch / "plan.json", MAX_WINDOW_BYTES)
    with np.load(shards, allow_pickle=False) as arrays:
        plan = Plan(arrays["pieces"], arrays["ends"], json.loads(about.read_bytes()))
    shards.unlink()
    about.unlink()
    return plan


@dataclass
class _Row:
    """A bucket's samples in the dataset's order, as it grows window by window."""

    bucket: int
    total: int
    """Bytes."""
    num_shards: int
    labels: Path
    bytes: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        self.pieces: array[int] = array("q")
        self.shards: array[int] = array("q")
        """The shard of each piece, from 0 in each bucket."""

    def append(self, window: int, bucket: int, sizes: NDArray[np.int64]) -> None:
        if not len(sizes):
            return
        begins = self.bytes + np.cumsum(sizes) - sizes
        # Ascending, and of a sample that begins behind all bytes there is none.
        shards = np.minimum((begins / self.total * self.num_shards).astype(np.int64), self.num_shards - 1)
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(sizes)]
        for start, stop in pairwise(cuts):
            self.pieces.extend((window, bucket, start, stop))
            self.shards.append(int(shards[start]))
        self.bytes += int(sizes.sum())
        self.samples += len(sizes)


def plan_parts(work: Work, *, aspects: Mapping[str, float], min_samples: int, shard_bytes: int) -> Iterator[Part]:
    """One part: the pieces of all shards, what the whole needs to know, and the file of labels.

    Raises:
        UserError: there is no sample, or columns do not fit.
    """
    if work.cursor is not None:
        return
    names = list(aspects) or [""]
    found = _read_windows(work.store)
    if not sum(found.samples):
        raise UserError("no sample is left: " + ", ".join(f"{n} {c:,}" for n, c in sorted(found.counts.items())))
    joined = join_small(aspects, found.samples, min_samples) if aspects else {0: 0}
    _check_columns(found.columns, names, joined)
    class_names = sorted(found.classes)
    if len(class_names) > MAX_CLASSES:
        raise UserError(f"{len(class_names):,} classes, more than {MAX_CLASSES:,}; class names seem to be captions")
    ids = {name: i for i, name in enumerate(class_names)}
    rows = {}
    for bucket in sorted(set(joined.values())):
        total = sum(found.bytes[b] for b, to in joined.items() if to == bucket)
        rows[bucket] = _Row(bucket, total, math.ceil(total / shard_bytes), work.scratch / f"labels.{bucket}")

    def load(name: str) -> tuple[Json, NDArray[Any]]:
        part = work.store.read_json(f"work/{WINDOWS}/done/{name}")["parts"][0]
        file = fetch(work.store, part["files"]["sizes"], work.scratch / f"{name}.npy", MAX_WINDOW_BYTES)
        sizes = np.load(file, allow_pickle=False)
        file.unlink()
        return part, sizes

    names_of_windows = work.store.names(f"work/{WINDOWS}/done")
    for number, (name, future) in enumerate(in_order(load, names_of_windows, threads=FETCHERS, ahead=2 * FETCHERS)):
        assert name == f"w{number:06d}.json", "windows are numbered in the order of their names"
        part, sizes = future.result()
        _append_window(number, part["note"], sizes, rows, joined, ids)
        work.advance(0)
    about: dict[str, Any] = {
        "buckets": [_bucket(names[b], aspects, row) for b, row in rows.items() if row.samples],
        "joined": [
            f"the {found.samples[b]:,} samples of {names[b]} stand in {names[to]}"
            for b, to in joined.items() if b != to and found.samples[b]
        ],
        "class_names": class_names, "columns": found.columns, "stats": found.stats.model_dump(mode="json"),
        "counts": dict(found.counts), "samples": sum(row.samples for row in rows.values()),
    }  # fmt: skip
    yield Part(
        _write(work, list(rows.values()), about, labelled=bool(class_names)), {"kept": about["samples"]}, cursor="end"
    )


def join_small(aspects: Mapping[str, float], samples: Sequence[int], min_samples: int) -> dict[int, int]:
    """Bucket to the bucket that takes its samples: itself, or where it has too few, the nearest that has enough."""
    total = sum(samples)
    least = max(min_samples, math.ceil(total * SMALLEST_SHARE), 1)
    logs = [math.log(aspect) for aspect in aspects.values()]
    enough = [b for b, count in enumerate(samples) if count >= least] or [int(np.argmax(samples))]
    return {b: b if b in enough else min(enough, key=lambda to: abs(logs[to] - logs[b])) for b in range(len(samples))}


def _check_columns(columns: Mapping[str, Json], names: Sequence[str], joined: Mapping[int, int]) -> None:
    """Stored latents have the shape of the bucket that they were encoded for, so these are the dataset's buckets as well."""
    if not columns:
        return
    from data.encode.columns import LatentsColumn, parse_column  # torch, of seconds in each worker

    for name, tree in columns.items():
        column = parse_column(tree, where=f"column {name}")
        if not isinstance(column, LatentsColumn) or not column.buckets:
            continue
        if set(names) != set(column.buckets):
            raise UserError(
                f"column {name}: was encoded for the buckets {', '.join(column.buckets)}; build with --buckets of just these"
            )
        for bucket, to in joined.items():
            if bucket != to:
                raise UserError(
                    f"column {name}: bucket {names[bucket]} has too few samples, and latents cannot move to {names[to]}; give "
                    "--min-samples-of-a-bucket 1, or encode with fewer buckets"
                )


@dataclass
class _Found:
    samples: list[int]
    """By bucket, as are `bytes`."""
    bytes: list[int]
    classes: set[str]
    columns: dict[str, Json]
    stats: Statistics
    counts: dict[str, int]


def _read_windows(store: StageStore) -> _Found:
    found = _Found([], [], set(), {}, Statistics(), {})
    counts: list[Mapping[str, int]] = []
    for receipt in done_receipts(store, WINDOWS):
        note = receipt["parts"][0]["note"]
        found.samples = _sums(found.samples, note["samples"])
        found.bytes = _sums(found.bytes, note["bytes"])
        found.classes |= set(note["classes"])
        found.stats.join(Statistics.model_validate(note["stats"]))
        counts.append(receipt["counts"])
        if sum(note["samples"]):
            for name, tree in note["columns"].items():
                if found.columns.setdefault(name, tree) != tree:
                    raise UserError(
                        f"column {name}: shards of it were encoded in different ways; encode anew into one folder"
                    )
    found.counts = dict(sum_counts(iter(counts)))
    return found


def _sums(totals: list[int], more: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(totals or [0] * len(more), more, strict=True)]


def _append_window(
    number: int,
    note: Json,
    sizes: NDArray[Any],
    rows: Mapping[int, _Row],
    joined: Mapping[int, int],
    ids: Mapping[str, int],
) -> None:
    assert sizes.dtype == SIZES
    ids_of_window = np.array([*(ids[name] for name in note["classes"]), -1], dtype="<i4")
    first = 0
    for bucket, count in enumerate(note["samples"]):
        of_bucket = sizes[first : first + count]
        first += count
        if count:
            row = rows[joined[bucket]]
            row.append(number, bucket, of_bucket["bytes"].astype(np.int64))
            if ids:
                with open(row.labels, "ab") as file:
                    file.write(ids_of_window[of_bucket["label"]].tobytes())


def _bucket(name: str, aspects: Mapping[str, float], row: _Row) -> dict[str, Any]:
    return {
        "name": name, "aspect": aspects.get(name, 0.0), "num_shards": len(np.unique(row.shards)), "samples": row.samples,
    }  # fmt: skip


def _write(work: Work, rows: Sequence[_Row], about: Json, *, labelled: bool) -> dict[str, Path]:
    pieces, ends, count = [], [], 0
    for row in rows:
        of_row = np.array(row.pieces, dtype=np.int64).reshape(-1, 4)
        last = np.flatnonzero(np.diff(np.array(row.shards, dtype=np.int64), append=-1))
        pieces.append(of_row)
        ends.append(count + last + 1)
        count += len(of_row)
    files = {"shards": work.scratch / "plan.npz", "about": work.scratch / "about.json"}
    np.savez(files["shards"], pieces=np.concatenate(pieces), ends=np.concatenate(ends))
    files["about"].write_text(json.dumps(about, ensure_ascii=False))
    if labelled:
        files["labels"] = work.scratch / LABELS
        with open(files["labels"], "wb") as out:
            for row in rows:
                if row.samples:
                    with open(row.labels, "rb") as file:
                        while chunk := file.read(1 << 22):
                            out.write(chunk)
    return files
