"""Datasets in the training schema, read by row. Shards are verified before their first use on a node."""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.images import ImageError, read_image
from data.mds import mds
from data.schema import (
    COLUMNS,
    DATASET,
    INDEX,
    MAX_DATASET_BYTES,
    MAX_INDEX_BYTES,
    DatasetInfo,
    Sample,
    Shard,
    index_digest,
    parse_dataset,
    parse_index,
)
from data.storage import DamagedShard, Marks, Storage, cache_folder, cached_shard, verify_file
from trainer.errors import UserError

__all__ = ["Dataset", "ImageError", "open_dataset", "read_image"]


class Dataset:
    """A dataset, or its first `max_samples` samples. Cheap to pickle; a process opens its own files."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        digest: str,
        info: DatasetInfo,
        shards: Sequence[Shard],
        max_samples: int | None,
        is_local: bool,
        cache_dir: str | None,
    ) -> None:
        self.url, self.name, self.digest, self.info = url, name, digest, info
        """`digest` is of the index and the schema, whatever `max_samples` is."""
        self.shards = tuple(shards)
        total = sum(shard.num_samples for shard in shards)
        self.num_samples = min(total, max_samples or total)
        self._ends = list(accumulate(shard.num_samples for shard in shards))
        """Samples up to and including each shard."""
        self.shard_sizes = tuple(
            max(0, min(end, self.num_samples) - (end - shard.num_samples))
            for end, shard in zip(self._ends, shards, strict=True)
        )
        """Samples of each shard, cut to `num_samples`."""
        self.class_names = info.class_names
        self.short_side = info.resize.short_side
        """Of the stored images, in pixels; None: as they came."""
        self._is_local, self._cache_dir = is_local, cache_dir
        self._open()

    def _open(self) -> None:
        self._storage: Storage | None = None
        self._marks: Marks | None = None
        self._readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_storage", "_marks", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.num_samples

    def read(self, index: int) -> Sample:
        """The sample in row `index`.

        Raises:
            IndexError: not 0 <= index < num_samples.
            UserError: the shard is missing or damaged, or the row does not fit the schema.
            StorageError: remote storage does not answer.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"dataset {self.name}: no sample {index}, it has {self.num_samples}")
        shard_index = bisect.bisect_right(self._ends, index)
        if shard_index not in self._readers:
            self._readers[shard_index] = self._reader(shard_index)
        row = index - (self._ends[shard_index] - self.shards[shard_index].num_samples)
        try:
            return _sample(self._readers[shard_index].get_item(row))
        except FileNotFoundError as e:
            raise UserError(f"{e.filename}: the shard has gone since it was verified; copy or build it again") from None
        except (ValueError, KeyError, IndexError, TypeError) as e:
            where = f"{self.url}/{self.shards[shard_index].name}: sample {row}"
            raise UserError(f"{where} does not fit the training schema ({e}); build the dataset again") from None

    def verify_shard(self, shard_index: int) -> Path:
        """Read a whole shard and compare its hash, whatever was verified before; returns where it lies on disk.

        Raises:
            UserError: missing or damaged.
            StorageError: remote storage does not answer.
        """
        path = self._local_path(shard_index)
        verify_file(path, self.shards[shard_index])
        return path

    def _reader(self, shard_index: int) -> Any:
        """MDSReader of a verified shard."""
        if self._marks is None:
            self._marks = Marks(cache_folder(self._cache_dir))
        path, shard = self._local_path(shard_index), self.shards[shard_index]
        try:
            self._marks.verify(path, shard)
        except DamagedShard:
            if self._is_local:
                raise
            path.unlink(missing_ok=True)  # our copy rotted: take a fresh one
            path = self._local_path(shard_index)
            self._marks.verify(path, shard)
        entry = {**shard.entry, "raw_data": {**shard.entry["raw_data"], "basename": path.name}}
        return mds().Reader.from_json(str(path.parent), None, entry)

    def _local_path(self, shard_index: int) -> Path:
        """Where a shard lies on this machine, fetched if it is remote."""
        if self._storage is None:
            self._storage = Storage(self.url)
        shard = self.shards[shard_index]
        if self._is_local:
            return Path(self._storage.path(shard.name))
        path = cached_shard(cache_folder(self._cache_dir), self.url, shard)
        if not path.exists():
            try:
                self._storage.fetch(shard, path)
            except FileNotFoundError:
                raise UserError(f"{self.url}/{shard.name}: missing, though the index names it; upload it again or "
                                "build the dataset again") from None  # fmt: skip
        return path


def open_dataset(url: str, *, name: str, max_samples: int | None = None, cache_dir: str | None = None) -> Dataset:
    """Open a dataset that `loupe data build` has written. Reads the two small files, no shard.

    Args:
        url: folder or any fsspec URL.
        name: what the run's config calls it; prefixes keys and errors.
        max_samples: use the first so many.
        cache_dir: for shards of remote datasets and marks of verified ones; the system's cache folder when absent.

    Raises:
        UserError: missing, empty, not MDS, of another schema, or unsafe to read.
        StorageError: remote storage does not answer.
    """
    storage = Storage(url)
    try:
        index = storage.read(INDEX, max_bytes=MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise UserError(f"dataset {name}: no {INDEX} in {storage.url}; build one with `loupe data build SOURCE "
                        f"{storage.url}`") from None  # fmt: skip
    shards = parse_index(index, source=f"{storage.url}/{INDEX}")
    try:
        description = storage.read(DATASET, max_bytes=MAX_DATASET_BYTES)
    except FileNotFoundError:
        raise UserError(f"dataset {name}: {storage.url} has an {INDEX} but no {DATASET}: its upload was not finished, "
                        "or it is not in Loupe's schema; build it with `loupe data build`") from None  # fmt: skip
    info = parse_dataset(description, source=f"{storage.url}/{DATASET}")
    digest = index_digest(index)
    total = sum(shard.num_samples for shard in shards)
    if info.index_digest != digest or info.num_samples != total:
        raise UserError(
            f"dataset {name}: {INDEX} and {DATASET} in {storage.url} are of different builds; build it again"
        )
    for shard in shards:
        for column, encoding in zip(shard.entry["column_names"], shard.entry["column_encodings"], strict=True):
            if column not in COLUMNS and not _is_encoding(encoding):
                raise UserError(f"{storage.url}/{INDEX}: column {column!r} has the unknown encoding {encoding!r}")
    return Dataset(
        storage.url,
        name=name,
        digest=digest,
        info=info,
        shards=shards,
        max_samples=max_samples,
        is_local=storage.is_local,
        cache_dir=cache_dir,
    )


def _is_encoding(encoding: str) -> bool:
    try:
        return bool(mds().is_encoding(encoding))
    except (KeyError, ValueError, TypeError, AttributeError):  # how it refuses the part after a colon
        return False


def _sample(row: dict[str, Any]) -> Sample:
    key, image, captions, label = (row[column] for column in COLUMNS)
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions are not a list of texts")
    return Sample(key=key, image=bytes(image), captions=tuple(captions), label=int(label))
