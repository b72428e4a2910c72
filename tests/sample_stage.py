"""Samples between stages, made of image files at once: what `ingest` would put out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from data.images import image_format, read_image
from data.stages.runner import Part, Pass, Stage, Work, Worker
from data.stages.samples import Row, SampleWriter
from data.stages.store import Json, StageStore


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


def write_samples(url: str, files: Sequence[Path], *, shard_samples: int = 1000) -> str:
    Worker(Files(files, shard_samples), StageStore(url)).run()
    return url


def read_parquets(url: str, pass_name: str, role: str) -> list[dict[str, Any]]:
    """The rows of all sidecars of a finished stage, by receipts."""
    import pyarrow.parquet as pq

    from data.stages.runner import done_receipts

    store, rows = StageStore(url), []
    for receipt in done_receipts(store, pass_name):
        for part in receipt["parts"]:
            rows += pq.read_table(store.path(part["files"][role]["name"]), filesystem=store.fs).to_pylist()
    return rows
