"""Shards of samples between stages: a WebDataset tar of at most 1,000 images, and a parquet index of it.

The index holds all that is known of each sample and where in the tar its image lies, so that what needs no pixels (captions,
plans, statistics) reads no tar, and what needs one image reads that alone. Images are written once; what later stages find out
about them goes into sidecars, never back.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.stages.by_shard import PartsByShard
from data.stages.receipts import check_name, done_receipts, file_name, part_name, part_receipts, pass_folder
from data.stages.runner import Part, Pass, Work
from data.stages.spared import spared
from data.stages.store import SUMMARY, Json, StageStore, read_stage
from data.storage import DamagedFile, DamagedShard, deadline_for, with_retries
from trainer.errors import UserError

ORIGINAL = "original"
"""The kind of captions that images came with."""
MAX_TAR_BYTES = 64 << 30
MAX_INDEX_BYTES = 1 << 30
ITEMS = 4096
"""Shards, about, up to which each is an item of the stage that follows: items have receipts, listed again and again."""

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
        raise UserError(f"{path.name}: not an index of samples ({e}); {StageStore.mend}") from None


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Shard:
    """A shard of a stage's output. Picklable and small."""

    name: str
    """Of its item and its part; fit for an item of the next stage."""
    tar: Mapping[str, Any]
    """name, bytes, xxh64 of the file."""
    index: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    before: Sequence[str] = ()
    """Names of what it was made of: a shard of the stage before, one of that before it, and so on."""

    @property
    def note(self) -> dict[str, Json]:
        """For a part that is made of this shard: by it the part is found again."""
        return {"shard": self.name, "before": list(self.before)}


@dataclass(frozen=True)
class Samples:
    """What a stage that writes samples has put out: `ingest`, `faces`."""

    url: str
    pass_name: str
    drops: str | None = None
    """Pass whose files list the rows to leave out, duplicates."""
    ids: tuple[str, ...] = ()
    """Of this output, of what it was made of, and so on to `ingest`: no other output has the same, wherever it is moved."""

    def each_shard(self) -> Iterator[Shard]:
        """In order. Reads every receipt: a second for a thousand or so on object storage."""
        for receipt in done_receipts(StageStore(self.url), self.pass_name):
            for part in receipt["parts"]:
                if part["files"]:
                    yield _shard(part)

    def shards(self) -> list[Shard]:
        return list(self.each_shard())

    def shard(self, name: str) -> Shard:
        """By its name, from its part's receipt: small, where its item's may be large.

        Raises:
            UserError: there is none.
        """
        item, _, part = name.rpartition("-")
        try:
            return _shard(StageStore(self.url).read_json(part_name(self.pass_name, item, int(part))))
        except (FileNotFoundError, DamagedFile):  # of a whole item its own receipt counts, and it has the same
            parts = self._parts(item)
        for one in parts:
            if one["part"] == int(part):
                return _shard(one)
        raise UserError(f"{self.url}: has no receipt of shard {name}; {StageStore.mend}")

    def _parts(self, item: str) -> list[Json]:
        """
        Raises:
            UserError: the item has no receipt.
        """
        name = f"{pass_folder(self.pass_name)}/done/{check_name(item, self.url)}.json"
        try:
            parts: list[Json] = StageStore(self.url).read_json(name)["parts"]
        except FileNotFoundError:
            raise UserError(
                f"{self.url}/{name}: is missing; run `loupe data verify {self.url} --quarantine`, then its stage again"
            ) from None
        return parts

    def items(self) -> list[Json]:
        """What a stage that follows has to do, small enough for any number of samples: `shards_of` reads the rest.

        One item a shard, up to `ITEMS`. Of more, an item is what was one before, or a run of its shards where it has very many.
        """
        parts = {
            receipt["item"]: [part["part"] for part in receipt["parts"] if part["files"]]
            for receipt in done_receipts(StageStore(self.url), self.pass_name)
        }
        run = max(1, -(-sum(map(len, parts.values())) // ITEMS))
        items: list[Json] = []
        for of, numbers in parts.items():
            if 1 < run >= len(numbers) > 0:
                items.append({"name": of, "of": of})
                continue
            for i in range(0, len(numbers), run):
                some = numbers[i : i + run]
                items.append({"name": shard_name(of, some[0]), "of": of, "first": some[0], "stop": some[-1] + 1})
        return items

    def shards_of(self, item: Json) -> list[Shard]:
        """The shards of one of `items`, in order, by one read."""
        of, first = item["of"], item.get("first", 0)
        stop = item.get("stop")
        if stop == first + 1:
            return [self.shard(shard_name(of, first))]
        return [_shard(part) for part in self._parts(of)[first:stop] if part["files"]]

    @cached_property
    def dropped(self) -> PartsByShard | None:
        return PartsByShard(self.url, self.drops) if self.drops else None


def shard_name(item: str, part: int) -> str:
    return f"{item}-{part:04d}"


def _shard(part: Json) -> Shard:
    note = part["note"] or {}
    before = [note["shard"], *note["before"]] if "shard" in note else []
    return Shard(
        shard_name(part["item"], part["part"]), part["files"]["tar"], part["files"]["index"], part["counts"], before
    )


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
    return samples_of(store, stage)


def samples_of(store: StageStore, stage: Mapping[str, Json]) -> Samples:
    """Of a stage that is known to write samples, finished or not."""
    drops = "drops" if "drops" in stage["passes"] else None
    return Samples(store.url, stage["stage"], drops, (stage["id"], *stage["settings"].get("made_of", ())))


def parts_by_shard(
    samples: Samples, pass_name: str, work: Work, make: Callable[[Shard], tuple[Mapping[str, Path], Mapping[str, int]]]
) -> Iterator[Part]:
    """A part for each shard of an item, of the files and counts that `make` gives, but for those that have theirs already.

    Raises:
        Exception: a shard cannot be read, or not now. The others are done first (see `spared`).
    """
    receipts = part_receipts(work.store, pass_name, work.item["name"])[: work.part] if work.part else []
    done = {receipt["note"]["shard"] for receipt in receipts}

    def part(shard: Shard) -> Iterator[Part]:
        yield Part(*make(shard), cursor=shard.name, note=shard.note)

    return spared((part(shard) for shard in samples.shards_of(work.item) if shard.name not in done), "shards")


def shards_left(samples: Samples, item: Json, receipts: Sequence[Json]) -> dict[str, int]:
    """Of an item that `parts_by_shard` has not done to its end."""
    done = {receipt["note"]["shard"] for receipt in receipts}
    left = [shard for shard in samples.shards_of(item) if shard.name not in done]
    return {"shards": len(left), "samples": sum(shard.counts.get("kept", 0) for shard in left)}


def pass_by_shard(name: str, samples: Callable[[], Samples], parts: Callable[[Work], Iterator[Part]]) -> Pass:
    """A pass over all shards whose parts are `parts_by_shard`'s: of an item that is given up only what failed is left out.

    Args:
        samples: asked for when they are needed, not to make the pass.
    """
    return Pass(
        name,
        lambda _store: samples().items(),
        parts,
        spares=True,
        left=lambda item, receipts: shards_left(samples(), item, receipts),
    )


def fetch(store: StageStore, file: Mapping[str, Any], target: Path, max_bytes: int) -> Path:
    """Bring a file that a receipt names to `target`, verified.

    Raises:
        UserError: larger than allowed, gone, or not what the receipt says.
        StorageError: storage does not answer.
    """
    where = f"{store.url}/{file_name(file['name'], store.url)}"
    if file["bytes"] > max_bytes:
        raise UserError(f"{where}: {file['bytes']} bytes, more than the {max_bytes} it may have")

    def attempt(deadline: float) -> None:
        hasher = xxhash.xxh64()
        with open(target, "wb") as out:
            for chunk in store.ranges(file["name"], file["bytes"], deadline):
                hasher.update(chunk)
                out.write(chunk)
        if hasher.hexdigest() != file["xxh64"]:
            raise DamagedShard(f"{where}: is not what its receipt says; {_mend(store)}")

    try:
        with_retries(attempt, where, deadline_for(file["bytes"]))
    except FileNotFoundError:
        raise UserError(f"{where}: is gone, though a receipt names it; {_mend(store)}") from None
    return target


def _mend(store: StageStore) -> str:
    return f"run `loupe data verify {store.url} --quarantine`, then the command that wrote it, then this again"


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
    keys: set[str] = set()
    if samples.dropped is None:
        return keys
    for part in samples.dropped.of(shard.name):
        file = fetch(
            StageStore(samples.url), part["files"]["drops"], scratch / f"{shard.name}.drops.json", MAX_INDEX_BYTES
        )
        keys |= set(json.loads(file.read_bytes()))
        file.unlink()
    return keys


def _plain(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {kind: list(texts) for kind, texts in captions.items()}
