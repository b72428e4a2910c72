"""Samples, their columns and datasets with columns, as the stages leave them, at a size for tests."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from data.encode.columns import MDS_ENCODING, Sidecar, read_sidecar
from data.encode.stage import PASS, ROLE
from data.mds import mds
from data.reader import open_dataset
from data.schema import COLUMNS, DATASET, HASH, INDEX, Bucket, DatasetInfo, index_digest
from data.stages.receipts import done_receipts
from data.stages.runner import Part, Pass, Stage, Work, Worker
from data.stages.samples import ORIGINAL, Row, SampleWriter, open_samples
from data.stages.store import Json, StageStore
from trainer.config import resolve_url

EMOJI = "repo://data/assets/emoji_64"
Given = tuple[str, bytes, Mapping[str, Sequence[str]]]
"""Key, image file, captions by kind."""


class Samples(Stage):
    """What `ingest` leaves of given images: two shards. An image that nothing can read is taken to be 64 x 64."""

    name: ClassVar[str] = "ingest"

    def __init__(self, given: Sequence[Given], shards: int = 2) -> None:
        size = -(-len(given) // shards)
        self.shards = [list(given[i : i + size]) for i in range(0, len(given), size)]

    def settings(self) -> dict[str, Json]:
        return {}

    def passes(self) -> Sequence[Pass]:
        names = [{"name": f"shard{i}"} for i in range(len(self.shards))]
        return (Pass("ingest", lambda _: names, self._parts),)

    def _parts(self, work: Work) -> Iterator[Part]:
        writer = SampleWriter(work.scratch)
        for key, image, captions in self.shards[int(work.item["name"].removeprefix("shard"))]:
            writer.add(_row(key, image, captions), image)
        count = len(writer.rows)
        yield Part(writer.close(), {"read": count, "kept": count}, cursor=count)


class Captions(Stage):
    """What `recaption` leaves for the first of the shards of `Samples`: (key, kind, caption)."""

    name: ClassVar[str] = "recaption"

    def __init__(self, source: str, rows: Sequence[tuple[str, str, str]]) -> None:
        self.samples, self.rows = open_samples(source), rows

    def settings(self) -> dict[str, Json]:
        return {"input": self.samples.url, "made_of": list(self.samples.ids)}

    def passes(self) -> Sequence[Pass]:
        return (Pass("recaption", lambda _: self.samples.items()[:1], self._parts),)

    def _parts(self, work: Work) -> Iterator[Part]:
        [shard] = self.samples.shards_of(work.item)
        path = work.scratch / "captions.parquet"
        columns = dict(zip(("key", "kind", "caption"), map(list, zip(*self.rows, strict=True)), strict=True))
        pq.write_table(pa.table(columns), path)
        yield Part({"captions": path}, {"read": len(self.rows)}, cursor=1, note=shard.note)


def _row(key: str, image: bytes, captions: Mapping[str, Sequence[str]]) -> Row:
    width, height, kind = 64, 64, "jpeg"
    try:
        with Image.open(io.BytesIO(image)) as file:
            (width, height), kind = file.size, str(file.format).lower()
    except OSError:
        pass
    return Row(key, width, height, kind, captions, xxhash.xxh3_128(image).digest())


def write_samples(url: str, given: Sequence[Given], shards: int = 2) -> None:
    assert Worker(Samples(given, shards), StageStore(url)).run() == []


def emoji(count: int) -> list[Given]:
    dataset = open_dataset(resolve_url(EMOJI), name="emoji")
    rows = [dataset.read(i) for i in range(count)]
    return [(f"{i:04d}", row.image, {ORIGINAL: row.texts}) for i, row in enumerate(rows)]


def sidecars(url: str, folder: Path) -> list[Sidecar]:
    """All that `encode` has put out, in order."""
    store, found = StageStore(url), []
    for receipt in done_receipts(store, PASS):
        for part in receipt["parts"]:
            name = part["files"][ROLE]["name"]
            target = folder / name.replace("/", "-")
            store.fs.get_file(store.path(name), str(target))
            found.append(read_sidecar(target, where=name))
    return found


def write_dataset(
    out: Path,
    given: Sequence[Given],
    encoded: Sequence[Sequence[Sidecar]],
    *,
    buckets: Sequence[tuple[str, float, int]] = (),
) -> str:
    """An MDS dataset with the columns of several `encode` outputs, as `loupe data build --columns` leaves one.

    Args:
        buckets: (name, aspect, samples) in the order of `given`; a shard each.
    """
    names = {name: column for parts in encoded for name, column in parts[0].described.items()}
    columns = {**COLUMNS, **dict.fromkeys(names, MDS_ENCODING)}
    rows: list[dict[str, Any]] = []
    for key, image, captions in given:
        row: dict[str, Any] = {
            "key": key,
            "image": image,
            "label": -1,
            "captions": {k: list(v) for k, v in captions.items()},
        }
        for parts in encoded:
            values = next((part.of(key, xxhash.xxh3_128(image).digest()) for part in parts if key in part.values), None)
            row |= values or dict.fromkeys(parts[0].columns, b"")
        rows.append(row)
    writer = mds().Writer(columns=columns, out=str(out), hashes=[HASH], size_limit=1 << 26)
    ends = {sum(count for _, _, count in buckets[: i + 1]) for i in range(len(buckets))}
    for i, row in enumerate(rows):
        writer.write(row)
        if i + 1 in ends and i + 1 < len(rows):
            writer.flush_shard()
            writer._reset_cache()
    writer.finish()
    index = (out / INDEX).read_bytes()
    info = DatasetInfo(
        name="given", num_samples=len(rows), index_digest=index_digest(index), columns=names,
        buckets=tuple(Bucket(name=n, aspect=a, first_shard=i, num_shards=1) for i, (n, a, _) in enumerate(buckets)),
    )  # fmt: skip
    (out / DATASET).write_text(info.model_dump_json())
    return str(out)
