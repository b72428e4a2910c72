"""The third pass: the shards themselves. Images come byte for byte out of the source's tars, by ranges, each by its hash.

A shard goes straight to where the dataset will lie. Its name holds its hash, so whoever does it again writes the same bytes
to the same name, and nobody can change a shard that an index names.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from data.ahead import in_order
from data.mds import mds
from data.mdsbuild.plan import WINDOWS, Piece, Plan, read_plan
from data.mdsbuild.windows import MAX_TAR_BYTES, column_role, slice_role
from data.publish import put_whole
from data.schema import COLUMNS, HASH
from data.stages.receipts import file_name
from data.stages.runner import Part, Work
from data.stages.samples import fetch
from data.stages.store import Json, StageStore
from data.storage import DamagedShard, Storage

SHARDS = "shards"
"""The pass."""
COLUMN_ENCODING = "bytes"
"""Of further columns."""
READERS = 16
"""Ranges that a worker asks for at a time."""
READ_AHEAD = 64
KEPT_SLICES = 4
ITEMS = 10_000
"""About as many items as there may be: each has receipts, and all are listed again and again."""
SHARDS_OF_ITEM = 16
"""Once there are enough for every worker: neighbours share their slices."""


def shard_items(plan: Plan) -> list[Json]:
    count = plan.num_shards
    size = max(-(-count // ITEMS), min(SHARDS_OF_ITEM, count // 256), 1)
    return [
        {"name": f"s{first:08d}", "first": first, "stop": min(first + size, count)} for first in range(0, count, size)
    ]


def shard_parts(work: Work, plan: Plan, source: StageStore, out: Storage) -> Iterator[Part]:
    """A part for each shard; its receipt's note has what the index will say of it."""
    columns = list(plan.about["columns"])
    class_ids = {name: i for i, name in enumerate(plan.about["class_names"])}
    slices = Slices(work.store, work.scratch)
    for number in range(work.cursor or work.item["first"], work.item["stop"]):
        writer = shard_writer(work.scratch / f"shard{number}", columns)
        rows = [row for piece in plan.of_shard(number) for row in slices.rows(piece, columns)]
        for row, image in read_images(source, rows):
            work.advance()
            sample = {"key": row["key"], "image": image, "captions": json.loads(row["captions"])}
            sample["label"] = -1 if row["class_name"] is None else class_ids[row["class_name"]]
            writer.write(sample | {name: row[name] for name in columns})
        data = writer.encode_joint_shard()
        writer.cancel_future_jobs()
        digest = xxhash.xxh64(data).hexdigest()
        file = work.scratch / "shard.mds"
        file.write_bytes(data)
        note: dict[str, Any] = {
            "name": f"shard.{number:06d}.{digest}.mds",
            "samples": len(rows),
            "bytes": len(data),
            HASH: digest,
        }
        del data, writer
        work.advance(0)
        put_whole(out, file, note["name"])
        file.unlink()
        yield Part({}, {"read": len(rows), "kept": len(rows), "bytes": note["bytes"]}, cursor=number + 1, note=note)


def shard_writer(folder: Path, columns: Sequence[str]) -> Any:
    """mosaicml-streaming's own, for one shard; of it the encoding is used, and neither its files nor its uploads."""
    encodings = COLUMNS | dict.fromkeys(columns, COLUMN_ENCODING)
    return mds().Writer(columns=encodings, out=str(folder), hashes=[HASH], size_limit=None)


class Slices:
    """Rows of windows, brought here a slice at a time; the last few are kept."""

    def __init__(self, store: StageStore, scratch: Path) -> None:
        self._store, self._scratch = store, scratch
        self._parts: OrderedDict[int, Json] = OrderedDict()
        self._tables: OrderedDict[tuple[int, str], Any] = OrderedDict()

    def rows(self, piece: Piece, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """What is known of the samples of a piece, as columns of `data.mdsbuild.windows.ROWS`, and their further columns."""
        part = self._part(piece.window)
        size = part["note"]["slice_rows"]
        for number in range(piece.start // size, -(-piece.stop // size)):
            start, stop = max(0, piece.start - number * size), min(size, piece.stop - number * size)
            rows = (
                self._table(piece.window, part, slice_role(piece.bucket, number)).slice(start, stop - start).to_pylist()
            )
            if columns:
                table = self._table(piece.window, part, column_role(piece.bucket, number)).slice(start, stop - start)
                present = [name for name in columns if name in table.column_names]
                for i, row in enumerate(rows):
                    row |= dict.fromkeys(columns, b"") | {name: table.column(name)[i].as_py() for name in present}
            yield from rows

    def _part(self, window: int) -> Json:
        return _kept(
            self._parts,
            window,
            64,
            lambda: self._store.read_json(f"work/{WINDOWS}/done/w{window:06d}.json")["parts"][0],
        )

    def _table(self, window: int, part: Json, role: str) -> Any:
        def read() -> Any:
            path = fetch(
                self._store, part["files"][role], self._scratch / f"slice.{window}.{role}.parquet", MAX_TAR_BYTES
            )
            table = pq.read_table(path, memory_map=False)
            path.unlink()
            return table

        return _kept(self._tables, (window, role), KEPT_SLICES, read)


def _kept(values: "OrderedDict[Any, Any]", key: Any, size: int, make: Any) -> Any:
    if key not in values:
        values[key] = make()
        if len(values) > size:
            values.popitem(last=False)
    values.move_to_end(key)
    return values[key]


def read_images(source: StageStore, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each row with its image, as the tar has it.

    Raises:
        BadShard: the tar has gone, or no longer has what its index says.
        UserError: access is denied.
        StorageError: storage fails for longer than the deadline.
    """

    def read(row: dict[str, Any]) -> bytes:
        where = f"{source.url}/{row['tar']}: {row['key']}"

        def check(data: bytes) -> None:
            if xxhash.xxh3_128_digest(data) != row["content"]:
                raise DamagedShard(f"{where}: is not the image that was put there; {source.mend}")

        return source.read_range(
            file_name(row["tar"], source.url), row["offset"], row["offset"] + row["size"], check=check
        )

    for row, future in in_order(read, rows, threads=READERS, ahead=READ_AHEAD):
        yield row, future.result()


class Plans:
    """The plan, read once by each process."""

    def __init__(self) -> None:
        self._plan: Plan | None = None

    def get(self, store: StageStore, scratch: Path) -> Plan:
        if self._plan is None:
            self._plan = read_plan(store, scratch)
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": None}
