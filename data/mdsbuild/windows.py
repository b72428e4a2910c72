"""The first pass: what is known of the samples of some input shards, joined, sorted into buckets and shuffled.

A window is as many input shards as are shuffled together. What comes out holds all that an output shard needs but the images,
in the order in which they will stand, cut into slices: whoever writes an output shard reads a slice or two of each window it
draws from, and no more. Memory is a window's rows; further columns, which may be large, pass through a slice at a time.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import draws
from data.ahead import in_order
from data.buckets import nearest
from data.mdsbuild.sidecars import ColumnValues, SidecarFiles, read_captions
from data.schema import ORIGINAL
from data.stages.runner import Part, Work
from data.stages.samples import MAX_TAR_BYTES, Row, Samples, Shard, shard_rows
from data.stages.store import Json
from data.stats import Statistics
from trainer.errors import UserError

WINDOW_SHARDS = 64
"""Input shards that are shuffled together, of at most 1,000 samples."""
SLICE_ROWS = 4096
SLICE_COLUMN_BYTES = 64 << 20
"""Of further columns in a slice, about."""
WINDOW_COLUMN_BYTES = 16 << 30
"""Of further columns in a window, about: what a worker needs on its disk."""
FETCHERS = 8
SAMPLE_OVERHEAD_BYTES = 64
"""More than the heads of a sample in a shard take: sizes of up to eight columns, its offset, its label."""

ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("tar", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("content", pa.binary(16)),
        ("captions", pa.string()),
        ("class_name", pa.string()),
    ]
)
SIZES = np.dtype([("bytes", "<u4"), ("label", "<i4")])
"""Of a sample in its shard, about; and its class as an index into the window's, -1 where none."""


@dataclass
class _Window:
    """A window's samples, in the order in which they were read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    """Number, within the window, of the shard that each came from."""
    buckets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stats: Statistics = field(default_factory=Statistics)
    counts: Counter[str] = field(default_factory=Counter)


def window_items(samples: Samples, seed: int, columns: Sequence[SidecarFiles]) -> list[Json]:
    """Windows of shards in an order drawn from the seed, so that what lay side by side in the source comes apart.

    Raises:
        UserError: the source has no samples.
    """
    names = [shard.name for shard in samples.each_shard()]
    if not names:
        raise UserError(f"{samples.url}: has no samples; all were left out, look at `loupe data stats {samples.url}`")
    size = _window_shards(samples, names, columns)
    names = [names[i] for i in draws.permutation(seed, "build windows", length=len(names))]
    return [
        {"name": f"w{n:06d}", "window": n, "shards": names[n * size : (n + 1) * size]}
        for n in range(-(-len(names) // size))
    ]


def _window_shards(samples: Samples, names: Sequence[str], columns: Sequence[SidecarFiles]) -> int:
    """Fewer where the columns are large: a worker holds a window of them on disk."""
    largest = 0
    for name in names[:: max(1, len(names) // 8)] if columns else ():
        shard = samples.shard(name)
        files = [file for sidecar in columns for file in sidecar.of(shard)]
        largest = max(largest, sum(file["bytes"] for file in files))
    return max(1, min(WINDOW_SHARDS, WINDOW_COLUMN_BYTES // max(1, largest)))


def window_parts(
    work: Work,
    samples: Samples,
    *,
    aspects: Mapping[str, float],
    seed: int,
    shard_bytes: int,
    captions: Sequence[SidecarFiles],
    columns: Sequence[SidecarFiles],
) -> Iterator[Part]:
    """One part: slices by bucket, sizes, and what the plan adds up."""
    if work.cursor is not None:
        return
    names = list(aspects) or [""]
    kinds = sorted({kind for sidecar in captions for kind in sidecar.names})
    window = _Window()
    values = ColumnValues(work.scratch, columns)

    def load(place: tuple[int, str]) -> tuple[Shard, list[Row], dict[str, dict[str, list[str]]]]:
        number, name = place
        shard = samples.shard(name)
        rows = shard_rows(samples, shard, work.scratch)
        values.load(number, shard)
        return shard, rows, read_captions(captions, shard, work.scratch)

    places = enumerate(work.item["shards"])
    for (number, _), future in in_order(load, places, threads=FETCHERS, ahead=FETCHERS):
        shard, rows, more = future.result()
        tar = shard.tar["name"]
        if shard.tar["bytes"] > MAX_TAR_BYTES:
            raise UserError(
                f"{samples.url}/{tar}: {shard.tar['bytes']} bytes, more than the {MAX_TAR_BYTES} it may have"
            )
        for row in rows:
            work.advance()
            of_row = more.get(row.key, {})
            if _take(window, row, number, tar, of_row, names, aspects, shard_bytes, values):
                window.counts.update(f"missing/captions/{kind}" for kind in kinds if not of_row.get(kind))
    yield _part(
        work,
        window,
        names,
        values,
        draws.permutation(seed, "build order", work.item["window"], length=len(window.rows)),
    )


def _take(
    window: _Window,
    row: Row,
    shard: int,
    tar: str,
    more: Mapping[str, Sequence[str]],
    names: Sequence[str],
    aspects: Mapping[str, float],
    shard_bytes: int,
    values: "ColumnValues",
) -> bool:
    """One sample into the window, or into the counts of what is left out; True: it is in."""
    captions = {kind: list(texts) for kind, texts in (*row.captions.items(), *more.items()) if texts}
    if not captions and row.class_name is not None:
        captions = {ORIGINAL: [" ".join(row.class_name.replace("_", " ").split())]}
    window.counts["read"] += 1
    if not captions:
        window.counts["rejected/no_caption"] += 1
        return False
    text = json.dumps(captions, ensure_ascii=False)
    num_bytes = (
        row.size
        + len(json.dumps(captions))
        + len(row.key.encode())
        + values.num_bytes(shard, row.key)
        + SAMPLE_OVERHEAD_BYTES
    )
    if num_bytes > shard_bytes:
        window.counts["rejected/larger_than_a_shard"] += 1
        return False
    values.check(shard, row.key, row.content)
    window.counts["kept"] += 1
    for name in values.missing(shard, row.key):
        window.counts[f"missing/{name}"] += 1
    window.rows.append(
        {
            "key": row.key, "tar": tar, "offset": row.offset, "size": row.size, "content": row.content, "captions": text,
            "class_name": row.class_name,
        }
    )  # fmt: skip
    window.shards.append(shard)
    window.buckets.append(names.index(nearest(row.width, row.height, aspects)) if aspects else 0)
    window.sizes.append(num_bytes)
    window.stats.add(
        key=row.key, width=row.width, height=row.height, num_bytes=row.size, kind=row.format, captions=captions,
        licence=row.licence, class_name=row.class_name,
    )  # fmt: skip
    return True


def _part(work: Work, window: _Window, names: Sequence[str], values: "ColumnValues", shuffled: np.ndarray) -> Part:
    buckets = np.array(window.buckets, dtype=np.int64)
    order = shuffled[np.argsort(buckets[shuffled], kind="stable")]
    classes = sorted({row["class_name"] for row in window.rows if row["class_name"] is not None})
    class_index = {name: i for i, name in enumerate(classes)}
    sizes = np.empty(len(order), dtype=SIZES)
    for place, i in enumerate(order):
        name = window.rows[i]["class_name"]
        sizes[place] = (window.sizes[i], -1 if name is None else class_index[name])
    files = {"sizes": work.scratch / "sizes.npy"}
    np.save(files["sizes"], sizes)
    slice_rows = min(SLICE_ROWS, max(16, SLICE_COLUMN_BYTES // max(1, values.largest)))
    counts = np.bincount(buckets, minlength=len(names))
    first = 0
    for bucket, count in enumerate(counts.tolist()):
        for number, start in enumerate(range(first, first + count, slice_rows)):
            chosen = order[start : min(start + slice_rows, first + count)]
            role = slice_role(bucket, number)
            files[role] = _write_slice(work, role, [window.rows[i] for i in chosen])
            if values.names:
                role = column_role(bucket, number)
                keys = [(window.shards[i], window.rows[i]["key"]) for i in chosen]
                files[role] = values.write(work.scratch / f"part.{role}.parquet", keys)
            work.advance(0)
        first += count
    note = {
        "samples": counts.tolist(), "slice_rows": slice_rows, "classes": classes, "columns": values.described,
        "stats": window.stats.model_dump(mode="json"),
        "bytes": [int(sizes["bytes"][a:b].sum(dtype=np.int64)) for a, b in _ranges(counts)],
    }  # fmt: skip
    return Part(files, window.counts, cursor="end", note=note)


def slice_role(bucket: int, number: int) -> str:
    return f"b{bucket}.s{number}"


def column_role(bucket: int, number: int) -> str:
    return f"b{bucket}.s{number}.columns"


def _ranges(counts: np.ndarray) -> list[tuple[int, int]]:
    ends = np.cumsum(counts).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _write_slice(work: Work, role: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = work.scratch / f"part.{role}.parquet"
    table = pa.table({name: [row[name] for row in rows] for name in ROWS.names}, schema=ROWS)
    pq.write_table(table, path, compression="zstd")
    return path
