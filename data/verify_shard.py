"""Check one shard of a dataset, wherever it lies: its bytes, its rows, and the images of some."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.images import ImageError, read_image
from data.mds import mds
from data.reader import Dataset
from data.schema import COLUMNS, HASH, Bucket, Sample, Shard, parse_captions
from data.storage import DEADLINE_S, BadShard, DamagedShard, Storage, check, with_retries
from data.verified import HeldFile
from data.wds import TarRows
from trainer.errors import UserError, one_line

MAX_FAILURES_OF_SHARD = 100
"""That are told one by one."""


@dataclass(frozen=True)
class Failure:
    text: str
    shard: int | None = None
    """Number of the shard, where one is damaged or missing as a whole: what can be repaired or set aside."""
    labels: bool = False
    """The file of labels is damaged or missing."""

    def __str__(self) -> str:
        return self.text


class Rows(Protocol):
    def sample(self, row: int) -> Sample: ...


@dataclass(frozen=True)
class Job:
    """What a process is told once."""

    dataset: Dataset
    scratch: str
    use_cache: bool


@dataclass
class Found:
    """Of a shard."""

    failures: list[Failure] = field(default_factory=list)
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Hashes."""
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    decoded: int = 0
    dropped: int = 0
    """Failures beyond those that are told."""

    def fail(self, text: str) -> None:
        if len(self.failures) < MAX_FAILURES_OF_SHARD:
            self.failures.append(Failure(text))
        else:
            self.dropped += 1


def check_shard(job: Job, number: int, rows: Sequence[int] | None) -> Found:
    """Of shard `number`: size, hash and count; every row; and the images of `rows`, or all.

    Raises:
        UserError: access is denied, or the disk is full.
        StorageError: storage does not answer.
    """
    shard, found = job.dataset.shards[number], Found()
    where = f"{job.dataset.shards_url}/{shard.name}"
    try:
        path, temporary = _local(job, number)
    except FileNotFoundError:
        found.failures.append(Failure(f"{where}: cannot be read (missing)", shard=number))
        return found
    except BadShard as e:  # nothing else: what is denied or full today is not damaged
        found.failures.append(Failure(str(e), shard=number))
        return found
    try:
        if "column_names" in shard.entry:  # MDS, whose reader would take a smaller number for granted
            with open(path, "rb") as file:
                count = int.from_bytes(file.read(4), "little")
            if count != shard.num_samples:
                text = f"{where}: holds {count} samples, the index says {shard.num_samples}"
                found.failures.append(Failure(text, shard=number))
                return found
        _check_rows(job, number, path, set(range(shard.num_samples) if rows is None else rows), found)
    finally:
        if temporary:
            path.unlink(missing_ok=True)
    if found.dropped:
        found.failures.append(Failure(f"{shard.name}: {found.dropped} failures more"))
    return found


def _local(job: Job, number: int) -> tuple[Path, bool]:
    """Where a shard lies on this machine, verified, and whether it is to be removed when done."""
    dataset, shard = job.dataset, job.dataset.shards[number]
    if dataset.is_local or job.use_cache:
        return dataset.verify_shard(number), False
    path = Path(job.scratch) / f"shard{number}"
    fetch_shard(Storage(dataset.shards_url), shard, path)
    return path, True


def fetch_shard(storage: Storage, shard: Shard, target: Path) -> None:
    """Bring a shard to `target`, verified.

    Raises:
        FileNotFoundError: there is none.
        DamagedShard: it is not what the index says, however often it is fetched.
        StorageError: storage does not answer.
    """
    where = f"{storage.url}/{shard.name}"

    def attempt(deadline: float) -> None:
        hasher, num_bytes = xxhash.xxh64(), 0
        with open(target, "wb") as file:
            for chunk in storage.ranges(shard.name, shard.num_bytes, deadline):
                hasher.update(chunk)
                num_bytes += len(chunk)
                file.write(chunk)
        check(shard, num_bytes, hasher.hexdigest(), where)

    with_retries(attempt, where, DEADLINE_S)


class _MDSRows:
    """By mosaicml-streaming's reader."""

    def __init__(self, path: Path, shard: Shard) -> None:
        entry = {
            "version": 2, "format": "mds", "compression": None, "hashes": [HASH], "size_limit": None, "zip_data": None,
            "samples": shard.num_samples,
            "raw_data": {"basename": path.name, "bytes": shard.num_bytes, "hashes": {HASH: shard.hash}},
            **{name: shard.entry[name] for name in ("column_names", "column_encodings", "column_sizes")},
        }  # fmt: skip
        self._reader = mds().Reader.from_json(str(path.parent), None, entry)

    def sample(self, row: int) -> Sample:
        values = self._reader.get_item(row)
        key, image, captions, label = (values[column] for column in COLUMNS)
        columns = {name: value for name, value in values.items() if name not in COLUMNS}
        return Sample(key, bytes(image), parse_captions(captions), int(label), columns=columns)


def _rows_of(job: Job, number: int, path: Path) -> Rows:
    dataset, shard = job.dataset, job.dataset.shards[number]
    if "rows_hash" not in shard.entry:
        return _MDSRows(path, shard)
    held = HeldFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
    return TarRows.open(held.read, shard, f"{dataset.shards_url}/{shard.name}", Storage(dataset.url), DEADLINE_S)


def _check_rows(job: Job, number: int, path: Path, decode: set[int], found: Found) -> None:
    shard, info = job.dataset.shards[number], job.dataset.info
    try:
        opened = _rows_of(job, number, path)
    except DamagedShard as e:  # of a tar: its file of rows
        found.fail(str(e))
        return
    bucket = _bucket_of(info.buckets, number)
    keys = np.zeros(shard.num_samples, dtype=np.uint64)
    labels = np.full(shard.num_samples, -1, dtype=np.int32)
    known = len(info.class_names) if info.class_names is not None else None
    for row in range(shard.num_samples):
        try:
            sample = opened.sample(row)
            labels[row] = sample.label
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
            found.fail(f"{shard.name} sample {row}: does not fit the training schema ({one_line(e)})")
            continue
        key = sample.key
        keys[row] = xxhash.xxh3_64_intdigest(key)
        if known is not None and not -1 <= sample.label < known:
            found.fail(f"{key}: label {sample.label} is none of the {known} classes")
        if unknown := sorted(set(sample.captions) - set(info.caption_kinds)):
            found.fail(f"{key}: has captions of kind {unknown[0]!r}, which the dataset does not name")
        if row not in decode:
            continue
        found.decoded += 1
        try:
            height, width = read_image(sample.image).shape[:2]
        except ImageError as e:
            found.fail(f"{key}: {e}")
            continue
        if bucket is not None and _misplaced(width / height, bucket, info.buckets):
            found.fail(f"{key}: {width} x {height} px stands in the bucket {bucket.name}")
        for column, description in info.columns.items():
            if problem := _column_problem(sample.columns, column, description, bucket, key):
                found.fail(problem)
    found.keys, found.labels = keys, labels


def _bucket_of(buckets: Sequence[Bucket], shard: int) -> Bucket | None:
    return next((b for b in buckets if b.first_shard <= shard < b.first_shard + b.num_shards), None)


def _misplaced(aspect: float, bucket: Bucket, buckets: Sequence[Bucket]) -> bool:
    """Neither in the nearest bucket nor in the next: a build joins small buckets to a neighbour."""
    nearest = sorted(buckets, key=lambda b: abs(log(b.aspect) - log(aspect)))
    return bucket not in nearest[:2]


def _column_problem(
    values: Mapping[str, bytes], column: str, description: Any, bucket: Bucket | None, key: str
) -> str | None:
    from data.encode.columns import LatentsColumn, bytes_to_latents, parse_column

    value = values.get(column)
    if not isinstance(value, bytes):
        return f"{key}: has no column {column!r}, which the dataset describes"
    try:
        parsed = parse_column(description, where=column)
        if value and isinstance(parsed, LatentsColumn):
            height, width = parsed.shapes[bucket.name if bucket and parsed.buckets else ""]
            bytes_to_latents(value, parsed, height, width, where=f"{key}: {column}")
    except UserError as e:
        return str(e)
    except KeyError:
        return f"{key}: {column} was encoded without the bucket {bucket.name if bucket else '(none)'}"
    return None
