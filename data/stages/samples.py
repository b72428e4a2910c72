"""Shards of samples between stages: a WebDataset tar of at most 1,000 images, and a parquet index of it.

The index holds all that is known of each sample and where in the tar its image lies, so that what needs no pixels (captions,
plans, statistics) reads no tar, and what needs one image reads that alone. Images are written once; what later stages find out
about them goes into sidecars, never back.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.stages.runner import Work, done_receipts
from data.stages.store import SUMMARY, StageStore, read_stage
from data.storage import DEADLINE_S, DamagedShard, with_retries
from trainer.errors import UserError

ORIGINAL = "original"
"""The kind of captions that images came with."""
MAX_TAR_BYTES = 64 << 30
MAX_INDEX_BYTES = 1 << 30

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("captions", pa.string()),
        ("class_name", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("content", pa.binary(16)),
        ("phash", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """A sample, as the index has it."""

    key: str
    """Unique in the whole output of a stage."""
    width: int
    """Of the upright image, in pixels."""
    height: int
    format: str
    """`jpeg`, `png` or `webp`."""
    captions: Mapping[str, Sequence[str]]
    """By kind."""
    content: bytes
    """xxh3_128 of the image file: equal for exact duplicates."""
    class_name: str | None = None
    licence: str | None = None
    source: str | None = None
    """Where it came from: a URL or a file, without credentials."""
    phash: int | None = None
    """Perceptual hash, 64 bits."""
    member: str = ""
    offset: int = -1
    """Of the image's first byte in the tar."""
    size: int = 0


class SampleWriter:
    """Writes one shard. Close it to have its index."""

    def __init__(self, folder: Path, stem: str = "samples") -> None:
        self.tar_path, self.index_path = folder / f"{stem}.tar", folder / f"{stem}.parquet"
        self._file = open(self.tar_path, "wb")  # noqa: SIM115
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        self.rows: list[Row] = []

    def add(self, row: Row, image: bytes) -> None:
        """A sample: its image, and a .json of what is known of it."""
        stem = f"{len(self.rows):06d}"
        member = f"{stem}.{'jpg' if row.format == 'jpeg' else row.format}"
        self._add(member, image)
        offset = self._file.tell() - -(-len(image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        about = {
            "key": row.key,
            "captions": {k: list(v) for k, v in row.captions.items()},
            "width": row.width,
            "height": row.height,
        }
        about |= {n: getattr(row, n) for n in ("class_name", "licence", "source") if getattr(row, n) is not None}
        self._add(f"{stem}.json", json.dumps(about, ensure_ascii=False).encode())
        self.rows.append(replace(row, member=member, offset=offset, size=len(image)))

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # of time 0 and nobody: equal samples give equal tars
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> dict[str, Path]:
        """The shard's files, by role, for a `Part`."""
        self._tar.close()
        self._file.close()
        write_index(self.index_path, self.rows)
        return {"tar": self.tar_path, "index": self.index_path}


def write_index(path: Path, rows: Sequence[Row]) -> None:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["captions"] = [json.dumps(_plain(row.captions), ensure_ascii=False) for row in rows]
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def read_index(path: Path) -> list[Row]:
    """
    Raises:
        UserError: it is no such index.
    """
    try:
        table = pq.read_table(path, columns=SCHEMA.names)
        rows = table.to_pylist()
        return [Row(**{**row, "captions": json.loads(row["captions"])}) for row in rows]
    except (pa.ArrowException, ValueError, TypeError, OSError) as e:
        raise UserError(f"{path.name}: not an index of samples ({e}); run the stage that wrote it again") from None


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Shard:
    """A shard of a stage's output. Picklable and small; JSON by `vars`."""

    name: str
    """Fit for an item of the next stage."""
    tar: Mapping[str, Any]
    """name, bytes, xxh64 of the file."""
    index: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What a stage that writes samples has put out: `ingest`, `faces`."""

    url: str
    pass_name: str
    drops: str | None = None
    """Pass whose files list the rows to leave out, duplicates."""

    def shards(self) -> list[Shard]:
        """In order. Reads every receipt: a second for a thousand or so on object storage.

        Raises:
            UserError: the stage is not finished.
        """
        store = StageStore(self.url)
        return [
            Shard(f"{receipt['item']}-{part['part']:04d}", part["files"]["tar"], part["files"]["index"], part["counts"])
            for receipt in done_receipts(store, self.pass_name)
            for part in receipt["parts"]
            if part["files"]
        ]


def open_samples(url: str) -> Samples:
    """The samples at `url`.

    Raises:
        UserError: no stage's output, of a stage without images, or not finished.
    """
    store = StageStore(url)
    stage = read_stage(store)
    if stage["stage"] not in ("ingest", "faces"):
        raise UserError(
            f"{url}: is the output of `{stage['stage']}`, which has no images; give that of `ingest` or `faces`"
        )
    if not store.exists(SUMMARY):
        raise UserError(
            f"{url}: `loupe data {stage['stage']}` is not finished there; run it again, it goes on where it stopped"
        )
    return Samples(store.url, stage["stage"], "drops" if stage["stage"] == "ingest" else None)


def fetch(store: StageStore, file: Mapping[str, Any], target: Path, max_bytes: int) -> Path:
    """Bring a file that a receipt names to `target`, verified.

    Raises:
        UserError: larger than allowed, gone, or not what the receipt says.
        StorageError: storage does not answer.
    """
    where = f"{store.url}/{file['name']}"
    if ".." in Path(file["name"]).parts or not file["name"].startswith("files/"):
        raise UserError(f"{where}: leads out of the stage's files; this receipt is not to be trusted")
    if file["bytes"] > max_bytes:
        raise UserError(f"{where}: {file['bytes']} bytes, more than the {max_bytes} it may have")

    def attempt(deadline: float) -> None:
        hasher = xxhash.xxh64()
        with open(target, "wb") as out:
            for chunk in store.ranges(file["name"], file["bytes"], deadline):
                hasher.update(chunk)
                out.write(chunk)
        if hasher.hexdigest() != file["xxh64"]:
            raise DamagedShard(f"{where}: is not what its receipt says; run the stage that wrote it again")

    try:
        with_retries(attempt, where, DEADLINE_S)
    except FileNotFoundError:
        raise UserError(f"{where}: is gone, though a receipt names it; run the stage that wrote it again") from None
    return target


def read_shard(samples: Samples, shard: Shard, work: Work) -> Iterator[tuple[Row, bytes]]:
    """The samples of a shard and their image files, in order, but for dropped ones."""
    store = StageStore(samples.url)
    rows = shard_rows(samples, shard, work.scratch)
    tar = fetch(store, shard.tar, work.scratch / f"{shard.name}.in.tar", MAX_TAR_BYTES)
    with open(tar, "rb") as file:
        for row in rows:
            file.seek(row.offset)
            data = file.read(row.size)
            yield row, data
    tar.unlink()


def shard_rows(samples: Samples, shard: Shard, scratch: Path) -> list[Row]:
    """The rows of a shard, but for dropped ones."""
    store = StageStore(samples.url)
    index = fetch(store, shard.index, scratch / f"{shard.name}.in.parquet", MAX_INDEX_BYTES)
    rows = read_index(index)
    index.unlink()
    dropped = dropped_keys(samples, shard, scratch)
    return [row for row in rows if row.key not in dropped] if dropped else rows


def dropped_keys(samples: Samples, shard: Shard, scratch: Path) -> set[str]:
    """Keys of the shard's samples that the stage has found to be duplicates."""
    if samples.drops is None:
        return set()
    store = StageStore(samples.url)
    try:
        receipt = store.read_json(f"work/{samples.drops}/done/{shard.name}.json")
    except FileNotFoundError:
        return set()
    keys: set[str] = set()
    for part in receipt["parts"]:
        file = fetch(store, part["files"]["drops"], scratch / f"{shard.name}.drops.json", MAX_INDEX_BYTES)
        keys |= set(json.loads(file.read_bytes()))
        file.unlink()
    return keys


def _plain(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {kind: list(texts) for kind, texts in captions.items()}
