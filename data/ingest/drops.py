"""Copies of earlier samples: found by one worker over the hashes of all, then told by shard, as later stages read it."""

import json
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data.ahead import in_order
from data.ingest.duplicates import EXACT, HASHES, NEAR, find_duplicates
from data.stages.runner import Part, Work, done_receipts
from data.stages.samples import MAX_INDEX_BYTES, fetch
from data.stages.store import Json, StageStore
from data.storage import StorageError, with_retries

PLAN = "plan"
_MAX_HASHES_BYTES = 1 << 20
_THREADS = 16
_DROP = np.dtype([("shard", "<u4"), ("row", "<u2"), ("reason", "<u2")])
_WORDS = {EXACT: "duplicate/exact", NEAR: "duplicate/perceptual"}


def shard_parts(store: StageStore) -> Iterator[Json]:
    """Receipts of the parts that have samples, in the order of `Samples.shards`."""
    for receipt in done_receipts(store, "ingest"):
        yield from (part for part in receipt["parts"] if part["files"])


def plan_parts(work: Work, distance: int | None) -> Iterator[Part]:
    """One part: file `drops`, records of `_DROP` in the order of shards and rows."""
    if work.cursor:
        return
    hash_files = []
    sizes = []
    for part in shard_parts(work.store):
        hash_files.append(part["files"]["hashes"])
        sizes.append(part["counts"]["kept"])
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def chunks() -> Iterator[NDArray[Any]]:
        read = in_order(lambda file: _read_hashes(work.store, file), hash_files, threads=_THREADS, ahead=4 * _THREADS)
        for size, (file, future) in zip(sizes, read, strict=True):
            chunk = future.result()
            if len(chunk) != size:
                raise StorageError(f"{work.store.url}/{file['name']}: {len(chunk)} hashes of {size} samples")
            yield chunk

    reasons = find_duplicates(chunks(), int(starts[-1]), distance, work.scratch, lambda: work.advance(0))
    rows = np.flatnonzero(reasons)
    shards = np.searchsorted(starts, rows, side="right") - 1
    drops = np.empty(len(rows), _DROP)
    drops["shard"], drops["row"], drops["reason"] = shards, rows - starts[shards], reasons[rows]
    path = work.scratch / "drops.bin"
    drops.tofile(path)
    yield Part({"drops": path}, {"compared": int(starts[-1])}, {"done": True})


def _read_hashes(store: StageStore, file: Json) -> NDArray[Any]:
    def attempt(_deadline: float) -> bytes:
        data = store.read(file["name"], max_bytes=_MAX_HASHES_BYTES)
        if len(data) != file["bytes"] or xxhash.xxh64(data).hexdigest() != file["xxh64"]:
            raise StorageError(f"{store.url}/{file['name']}: is not what its receipt says")
        return data

    hashes: NDArray[Any] = np.load(BytesIO(with_retries(attempt, file["name"], 60.0)), allow_pickle=False)
    if hashes.dtype != HASHES:
        raise StorageError(f"{store.url}/{file['name']}: no file of hashes")
    return hashes


def drop_items(store: StageStore) -> list[Json]:
    """One for each shard that has copies: where in the plan its own stand."""
    (plan,) = done_receipts(store, PLAN)
    if not plan["parts"]:
        return []
    file = plan["parts"][0]["files"]["drops"]
    data = store.read(file["name"], max_bytes=file["bytes"])
    shards = np.frombuffer(data, _DROP)["shard"]
    numbers, begins, counts = np.unique(shards, return_index=True, return_counts=True)
    where = dict(zip(numbers.tolist(), zip(begins.tolist(), counts.tolist(), strict=True), strict=True))
    return [
        {
            "name": f"{part['item']}-{part['part']:04d}", "index": part["files"]["index"], "plan": file["name"],
            "begin": where[number][0], "count": where[number][1],
        }
        for number, part in enumerate(shard_parts(store))
        if number in where
    ]  # fmt: skip


def drop_parts(work: Work) -> Iterator[Part]:
    """One part: file `drops`, a JSON list of the keys of a shard's samples to leave out."""
    if work.cursor:
        return
    item = work.item
    begin, end = item["begin"] * _DROP.itemsize, (item["begin"] + item["count"]) * _DROP.itemsize

    def attempt(_deadline: float) -> bytes:
        data: bytes = work.store.fs.cat_file(work.store.path(item["plan"]), start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"{len(data)} of {end - begin} bytes arrived")
        return data

    drops = np.frombuffer(with_retries(attempt, f"{work.store.url}/{item['plan']}", 300.0), _DROP)
    index = fetch(work.store, item["index"], work.scratch / "in.parquet", MAX_INDEX_BYTES)
    keys = pq.read_table(index, columns=["key"])["key"].to_pylist()
    index.unlink()
    path = work.scratch / "drops.json"
    path.write_text(json.dumps([keys[row] for row in drops["row"].tolist()], ensure_ascii=False), encoding="utf-8")
    work.advance(len(drops))
    counts = Counter(_WORDS[reason] for reason in drops["reason"].tolist())
    yield Part({"drops": path}, dict(counts), {"done": True})
