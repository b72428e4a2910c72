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
from data.stages.receipts import done_receipts, file_name
from data.stages.runner import Part, Work
from data.stages.samples import MAX_INDEX_BYTES, Samples, fetch
from data.stages.store import Json, StageStore
from data.storage import DEADLINE_S, DamagedShard

PLAN = "plan"
_MAX_HASHES_BYTES = 1 << 20
_THREADS = 16
_DROP = np.dtype([("shard", "<u4"), ("row", "<u2"), ("reason", "<u2")])
_WORDS = {EXACT: "duplicate/exact", NEAR: "duplicate/perceptual"}


def shard_parts(store: StageStore) -> Iterator[Json]:
    """Receipts of the parts that have samples, in the order of `Samples.each_shard`."""
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
                raise DamagedShard(
                    f"{work.store.url}/{file['name']}: {len(chunk)} hashes of {size} samples; {work.store.mend}"
                )
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
    """
    Raises:
        DamagedShard: gone, or not what its receipt says.
        StorageError: storage fails for longer than the deadline.
    """
    where = f"{store.url}/{file_name(file['name'], store.url)}"

    def check(data: bytes) -> None:
        if xxhash.xxh64(data).hexdigest() != file["xxh64"]:
            raise DamagedShard(f"{where}: is not what its receipt says; {store.mend}")

    if file["bytes"] > _MAX_HASHES_BYTES:
        raise DamagedShard(
            f"{where}: {file['bytes']} bytes, more than the {_MAX_HASHES_BYTES} it may have; {store.mend}"
        )
    hashes: NDArray[Any] = np.load(
        BytesIO(store.read_range(file["name"], 0, file["bytes"], check=check)), allow_pickle=False
    )
    if hashes.dtype != HASHES:
        raise DamagedShard(f"{where}: no file of hashes; {store.mend}")
    return hashes


def drop_items(store: StageStore) -> list[Json]:
    """One for each item of `ingest` that has copies: where in the plan its own stand."""
    (plan,) = done_receipts(store, PLAN)
    if not plan["parts"]:
        return []
    file = plan["parts"][0]["files"]["drops"]
    name = file_name(file["name"], store.url)
    shards = np.frombuffer(store.read(name, max_bytes=file["bytes"]), _DROP)["shard"]
    items: list[Json] = []
    number = 0
    for receipt in done_receipts(store, "ingest"):
        first, number = number, number + sum(bool(part["files"]) for part in receipt["parts"])
        begin, end = np.searchsorted(shards, (first, number)).tolist()
        if begin < end:
            items.append(
                {
                    "name": receipt["item"], "of": receipt["item"], "plan": file["name"], "first_shard": first,
                    "begin": begin, "end": end,
                }
            )  # fmt: skip
    return items


def drop_parts(work: Work) -> Iterator[Part]:
    """One for each shard that has copies: file `drops`, a JSON list of the keys of its samples to leave out. The cursor: the
    next shard's number."""
    item = work.item
    drops = _read_drops(work, item)
    shards = Samples(work.store.url, "ingest").shards_of(item)
    numbers, begins = np.unique(drops["shard"], return_index=True)
    for number, own in zip(numbers.tolist(), np.split(drops, begins[1:]), strict=True):
        if number < (work.cursor or 0):
            continue
        shard = shards[number - item["first_shard"]]
        index = fetch(work.store, shard.index, work.scratch / "in.parquet", MAX_INDEX_BYTES)
        keys = pq.read_table(index, columns=["key"])["key"].to_pylist()
        index.unlink()
        path = work.scratch / "drops.json"
        path.write_text(json.dumps([keys[row] for row in own["row"].tolist()], ensure_ascii=False), encoding="utf-8")
        work.advance(len(own))
        counts = Counter(_WORDS[reason] for reason in own["reason"].tolist())
        yield Part({"drops": path}, dict(counts), cursor=number + 1, note=shard.note)


def _read_drops(work: Work, item: Json) -> NDArray[Any]:
    begin, end = item["begin"] * _DROP.itemsize, item["end"] * _DROP.itemsize
    name = file_name(item["plan"], work.store.url)

    def read() -> bytes:
        data: bytes = work.store.fs.cat_file(work.store.path(name), start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"{len(data)} of {end - begin} bytes arrived")
        return data

    return np.frombuffer(work.store.ask(read, name, DEADLINE_S, "read", end - begin), _DROP)
