"""Outputs of stages, written by the stages' own core out of image files: what `ingest`, `recaption` and `encode` put out,
without what they do."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.images import image_format, read_image
from data.measure import image_size
from data.stages.receipts import done_receipts
from data.stages.runner import Part, Pass, Stage, Work, Worker
from data.stages.samples import Row, Samples, SampleWriter, open_samples, shard_rows
from data.stages.store import Json, StageStore

SHARD = 20
"""Samples of a shard."""


@dataclass
class Files(Stage):
    """Image files as samples, some a shard."""

    name: ClassVar[str] = "ingest"

    files: Sequence[Path]
    shard_samples: int

    def settings(self) -> dict[str, Json]:
        return {"files": len(self.files)}

    def passes(self) -> Sequence[Pass]:
        return [Pass("ingest", self._items, self._parts)]

    def _items(self, _store: StageStore) -> list[Json]:
        starts = range(0, len(self.files), self.shard_samples)
        return [{"name": f"{number:05d}", "first": first} for number, first in enumerate(starts)]

    def _parts(self, work: Work) -> Iterator[Part]:
        if work.cursor is not None:
            return
        writer, first = SampleWriter(work.scratch), work.item["first"]
        for path in self.files[first : first + self.shard_samples]:
            data = path.read_bytes()
            height, width = read_image(data).shape[:2]
            content = xxhash.xxh3_128_digest(data)
            captions = {"original": (f"photo {path.stem}",)}
            writer.add(Row(path.name, width, height, image_format(data), captions, content), data)
        yield Part(writer.close(), {"read": len(writer.rows), "kept": len(writer.rows)}, cursor="end")


@dataclass
class PhotoStage(Stage):
    """Photos of a folder with metadata.jsonl. About every fourth has a class; of `drop_every` one is dropped as a duplicate."""

    name: ClassVar[str] = "ingest"

    folder: str
    drop_every: int = 0

    def settings(self) -> dict[str, Json]:
        return {"sources": [self.folder], "drop_every": self.drop_every}

    def passes(self) -> Sequence[Pass]:
        return [Pass("ingest", lambda _: self._items(), self._parts), Pass("drops", self._drop_items, self._drops)]

    def finish(self, store: StageStore) -> dict[str, Json]:
        store.create("notices/NOTICE", (Path(self.folder) / "NOTICE").read_bytes())
        return {}

    def _items(self) -> list[Json]:
        rows = photos(Path(self.folder))
        return [{"name": f"i{n:04d}", "rows": rows[n : n + 2 * SHARD]} for n in range(0, len(rows), 2 * SHARD)]

    def _parts(self, work: Work) -> Iterator[Part]:
        rows = work.item["rows"]
        for first in range(work.cursor or 0, len(rows), SHARD):
            writer = SampleWriter(work.scratch, f"shard{first}")
            for row in rows[first : first + SHARD]:
                work.advance()
                data = (Path(self.folder) / "images" / row["file_name"]).read_bytes()
                writer.add(sample(row, data), data)
            count = len(writer.rows)
            yield Part(
                writer.close(), {"read": count + 1, "kept": count, "rejected/too_small": 1}, cursor=first + SHARD
            )

    def _drop_items(self, store: StageStore) -> list[Json]:
        return Samples(store.url, "ingest").items() if self.drop_every else []

    def _drops(self, work: Work) -> Iterator[Part]:
        shards = Samples(work.store.url, "ingest").shards_of(work.item)
        keys = [row["file_name"] for row in photos(Path(self.folder))]
        for done in range(work.cursor or 0, len(shards)):
            item, _, part = shards[done].name.rpartition("-")
            first = int(item[1:]) + int(part) * SHARD
            dropped = [key for i, key in enumerate(keys) if i % self.drop_every == 0 and first <= i < first + SHARD]
            file = work.scratch / "drops.json"
            file.write_text(json.dumps(dropped))
            yield Part({"drops": file}, {"duplicate/exact": len(dropped)}, cursor=done + 1, note=shards[done].note)


@dataclass
class SidecarStage(Stage):
    """A file for each shard of `samples`, as `make(rows, path)` writes it."""

    name: ClassVar[str] = "recaption"
    role: ClassVar[str] = "captions"

    samples: str
    text: str = "a photo"
    kinds: Sequence[str] = ("short",)
    every: int = 1
    """Leave out the others."""

    def settings(self) -> dict[str, Json]:
        return {
            "input": self.samples, "made_of": list(open_samples(self.samples).ids), "text": self.text, **self.told(),
        }  # fmt: skip

    def told(self) -> dict[str, Json]:
        return {"prompts": dict.fromkeys(self.kinds, "")}

    def passes(self) -> Sequence[Pass]:
        return [Pass(self.name, self._items, self._parts)]

    def _items(self, _: StageStore) -> list[Json]:
        return open_samples(self.samples).items()

    def _parts(self, work: Work) -> Iterator[Part]:
        samples = open_samples(self.samples)
        shards = samples.shards_of(work.item)
        for done in range(work.cursor or 0, len(shards)):
            rows = shard_rows(samples, shards[done], work.scratch)[:: self.every]
            path = work.scratch / "side.parquet"
            self.write(path, rows)
            yield Part({self.role: path}, {"read": len(rows)}, cursor=done + 1, note=shards[done].note)

    def write(self, path: Path, samples: Sequence[Row]) -> None:
        rows = [
            {"key": s.key, "kind": kind, "caption": f"{self.text} {s.key}, {kind}"}
            for s in samples
            for kind in self.kinds
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)


@dataclass
class ColumnStage(SidecarStage):
    """16 channels of 2 x 2 latents, whose numbers follow from the key."""

    name: ClassVar[str] = "encode"
    role: ClassVar[str] = "columns"

    def told(self) -> dict[str, Json]:
        return {"columns": {"latents": latents_column().model_dump(mode="json")}}

    def write(self, path: Path, samples: Sequence[Row]) -> None:
        from data.encode.columns import write_sidecar

        keys = [s.key for s in samples]
        contents = [s.content if self.text != "other" else bytes(16) for s in samples]
        values = {"latents": [column_value(key) for key in keys]}
        write_sidecar(path, keys, contents, values, {"latents": latents_column()})


def latents_column():  # type: ignore[no-untyped-def]
    from data.encode.columns import LatentsColumn

    return LatentsColumn(
        dtype="float16", holds="mean", codec="somewhere", codec_class="Tiny", revision="0" * 64, channels=16, downsampling=8,
        resolution=16,
    )  # fmt: skip


def column_value(key: str) -> bytes:
    import torch

    from data.encode.columns import latents_to_bytes

    (number,) = struct.unpack("<I", xxhash.xxh32(key).digest())
    return latents_to_bytes(torch.full((16, 2, 2), number % 1000, dtype=torch.float16))


def photos(folder: Path) -> list[dict[str, Json]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def sample(row: Mapping[str, Json], data: bytes) -> Row:
    width, height = image_size(data)
    number = int(row["file_name"].partition(".")[0])
    return Row(
        key=row["file_name"], width=width, height=height, format=image_format(data),
        captions={"original": row["captions"]}, content=xxhash.xxh3_128_digest(data),
        class_name=f"class {number % 3}" if number % 4 == 0 else None, licence=row["license"], source=row["coco_url"],
    )  # fmt: skip


def run(stage: Stage, url: str) -> str:
    failures = Worker(stage, StageStore(url)).run()
    assert not failures, failures
    return url


def write_samples(url: str, files: Sequence[Path], *, shard_samples: int = 1000) -> str:
    return run(Files(files, shard_samples), url)


def read_parquets(url: str, pass_name: str, role: str) -> list[dict[str, Any]]:
    """The rows of all sidecars of a finished stage, by receipts."""
    store, rows = StageStore(url), []
    for receipt in done_receipts(store, pass_name):
        for part in receipt["parts"]:
            rows += pq.read_table(store.path(part["files"][role]["name"]), filesystem=store.fs).to_pylist()
    return rows
