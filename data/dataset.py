"""A dataset in the training schema, read by row. Shards are verified before their first use on a node."""

import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.cache import CacheFull, CacheSettings, ShardCache
from data.counts import Counts, Sums
from data.schema import DATASET, DatasetInfo, Sample, Shard
from data.shards import MDSRows, ReadBytes, ShardTable
from data.storage import DEADLINE_S, BadShard, DamagedShard, MissingShard, Storage
from data.verified import ChangedFile, HeldFile, Marks, cache_folder, open_local, verify_file
from data.wds import TarRows
from trainer import metric_names
from trainer.errors import UserError

Fetch = Literal["shards", "ranges"]

_MAX_OPEN = 192
"""Shards of a dataset that a process keeps open."""


class Rows(Protocol):
    """The rows of an open shard."""

    where: str

    def sample(self, row: int) -> Sample: ...


class Dataset:
    """A dataset, or its first `max_samples` samples. Cheap to pickle; a process opens its own files."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        info: DatasetInfo,
        shards: ShardTable,
        max_samples: int | None,
        cache: CacheSettings,
        shards_url: str | None = None,
        fetch: Fetch = "shards",
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """
        Args:
            shards_url: where the shards lie, if not beside the index.
        """
        self.url, self.name, self.info, self.shards = url, name, info, shards
        self.digest = info.digest
        """What a checkpoint is bound to, whatever `max_samples` is."""
        self.shards_url = shards_url or url
        self._ends = np.cumsum(shards.num_samples)
        """Samples up to and including each shard."""
        self.num_samples = min(int(self._ends[-1]), max_samples or int(self._ends[-1]))
        starts = self._ends - shards.num_samples
        self.shard_sizes = np.clip(self.num_samples - starts, 0, shards.num_samples)
        """int64: samples of each shard, cut to `num_samples`."""
        self.class_names = info.class_names
        self.short_side = info.resize.short_side
        """Of the stored images, in pixels; None: as they came."""
        self.cache_settings, self._fetch, self._deadline_s = cache, fetch, deadline_s
        self.is_local = Storage(self.shards_url).is_local
        self._begin()

    def _begin(self) -> None:
        """What each process has of its own."""
        self._lock = threading.Lock()
        self._counts = Counts()
        self.bad_shards: dict[int, str] = {}
        """Shards that are not read, and why: `missing_shard` or `damaged_shard`."""
        self._new_bad: dict[int, str] = {}
        self._open: OrderedDict[int, Rows] = OrderedDict()
        self._storage: Storage | None = None
        self._cache: ShardCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_counts", "bad_shards", "_new_bad", "_open", "_storage", "_cache")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self.num_samples

    # -------------------------------------------------------------------------------------------------------- rows

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row in it) of row `index`.

        Raises:
            IndexError: not 0 <= index < num_samples.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"dataset {self.name}: no sample {index}, it has {self.num_samples}")
        shard_index = int(np.searchsorted(self._ends, index, side="right"))
        return shard_index, index - int(self._ends[shard_index] - self.shards.num_samples[shard_index])

    def read(self, index: int) -> Sample:
        """The sample in row `index`.

        Raises:
            IndexError: not 0 <= index < num_samples.
            BadShard: its shard is missing or damaged, now or when it was tried before.
            UserError: the row does not fit the schema, access is denied, or the cache has no room.
            StorageError: remote storage does not answer.
        """
        shard_index, row = self.locate(index)
        for last_try in (False, True):
            rows = self._rows(shard_index)
            try:
                return rows.sample(row)
            except BadShard as e:
                raise self._leave_out(shard_index, e) from None
            except UserError:
                raise
            except ChangedFile as e:
                with self._lock:
                    self._open.pop(shard_index, None)
                if last_try:
                    raise self._leave_out(shard_index, DamagedShard(f"{e}; copy or build the dataset again")) from None
            except (ValueError, KeyError, IndexError, TypeError) as e:
                raise UserError(f"{rows.where}: sample {row} does not fit the training schema ({e}); build the dataset "
                                "again") from None  # fmt: skip
        raise AssertionError

    def read_labels(self) -> NDArray[np.int32]:
        """The label of each row, from the file of labels; -1 where none.

        Raises:
            UserError: the dataset has no such file, or it is damaged.
            StorageError: remote storage does not answer.
        """
        name, num_bytes = self.info.labels, 4 * self.info.num_samples
        if name is None:
            raise UserError(f"dataset {self.name}: {self.url} has no file of labels; build it again with "
                            "`loupe data build`, from a source with classes")  # fmt: skip
        try:
            data = Storage(self.url).read(name, max_bytes=num_bytes)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name}: missing, though {DATASET} names it; upload it again or build the "
                            "dataset again") from None  # fmt: skip
        if len(data) != num_bytes or xxhash.xxh64(data).hexdigest() != self.info.labels_xxh64:
            raise UserError(f"{self.url}/{name}: is damaged, or of another build; build the dataset again")
        return np.frombuffer(data, dtype="<i4")[: self.num_samples].astype(np.int32, copy=False)

    # ------------------------------------------------------------------------------------------------------ shards

    def prepare(self, shard_index: int, *, wait: bool = True) -> bool:
        """Have a shard on this machine, verified and open, before it is read. Threads may.

        Args:
            wait: False: do not wait for another process that is fetching it; returns False then.

        Raises:
            As `read`.
        """
        with self._lock:
            if shard_index in self._open:
                self._open.move_to_end(shard_index)
                return True
        if shard_index in self.bad_shards:
            reason, name = self.bad_shards[shard_index], self.shards[shard_index].name
            raise (MissingShard if reason == MissingShard.reason else DamagedShard)(
                f"{self.shards_url}/{name}: left out of this run ({reason})"
            )
        try:
            rows = self._open_shard(shard_index, wait)
        except BadShard as e:
            raise self._leave_out(shard_index, e) from None
        except ChangedFile as e:
            raise self._leave_out(shard_index, DamagedShard(f"{e}; copy or build the dataset again")) from None
        if rows is None:
            return False
        with self._lock:
            self._open[shard_index] = rows
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return True

    def release(self, shard_index: int) -> None:
        """A shard is not needed for now: it may make room for others. Read all the same, it is opened again."""
        with self._lock:
            self._open.pop(shard_index, None)

    def leave_out(self, shard_index: int, reason: str) -> None:
        """Read no sample of a shard any more, as the run has agreed."""
        self.bad_shards.setdefault(shard_index, reason)
        with self._lock:
            self._open.pop(shard_index, None)

    def forget_bad_shards(self) -> None:
        """What was found out here, or told by `leave_out`; it is tried again."""
        with self._lock:
            self.bad_shards.clear()
            self._new_bad.clear()

    def news(self) -> tuple[dict[int, str], Sums]:
        """Since the last call, in this process: shards found bad, and what was counted."""
        with self._lock:
            new, self._new_bad = self._new_bad, {}
        return new, self._counts.take()

    def verify_shard(self, shard_index: int) -> Path:
        """Read a whole shard and compare its hash, whatever was verified before; returns where it lies on disk.

        Raises:
            BadShard: missing or damaged.
            StorageError: remote storage does not answer.
        """
        shard = self.shards[shard_index]
        if self.is_local:
            path = Path(self._stored().path(shard.name))
            verify_file(path, shard)
            return path
        held = self._cached().open(self._stored(), shard, deadline_s=self._deadline_s)
        assert held
        verify_file(held.path, shard)
        return held.path

    def bytes_in_use(self, window_shards: int, prefetch_shards: int) -> int:
        """What the node's cache must hold of this dataset at a time, at most."""
        if self.is_local or self._fetch == "ranges":
            return 0
        used = np.where(self.shard_sizes > 0, self.shards.num_bytes, 0)
        return int(np.sort(used)[::-1][: window_shards + prefetch_shards].sum())

    def _rows(self, shard_index: int) -> Rows:
        with self._lock:
            if shard_index in self._open:
                self._open.move_to_end(shard_index)
                return self._open[shard_index]
        began = time.monotonic()
        while True:
            self.prepare(shard_index)
            with self._lock:  # other threads may have closed it already
                if shard_index in self._open:
                    self._counts.add(metric_names.SHARD_WAIT, time.monotonic() - began)
                    return self._open[shard_index]

    def _open_shard(self, shard_index: int, wait: bool) -> Rows | None:
        shard, storage = self.shards[shard_index], self._stored()
        where = f"{self.shards_url}/{shard.name}"
        read: ReadBytes
        held: HeldFile | None
        if self.is_local:
            marks = Marks(cache_folder(self.cache_settings.folder))
            held = open_local(Path(storage.path(shard.name)), shard, marks, wait=wait)
            if held is None:
                return None
            read = held.read
        elif self._fetch == "ranges":
            read = partial(storage.read_range, shard.name, deadline_s=self._deadline_s, counts=self._counts)
        else:
            held = self._open_cached(storage, shard, wait)
            if held is None:
                return None
            read = held.read
        if "rows_hash" in shard.entry:
            return TarRows.open(read, shard, where, Storage(self.url), self._deadline_s)
        return MDSRows(read, shard, where)

    def _open_cached(self, storage: Storage, shard: Shard, wait: bool) -> HeldFile | None:
        while True:
            try:
                return self._cached().open(storage, shard, deadline_s=self._deadline_s, wait=wait)
            except CacheFull:
                # What this process has open may be in the way. But not of what is only to come later.
                with self._lock:
                    if not self._open or not wait:
                        raise
                    self._open.popitem(last=False)

    def _leave_out(self, shard_index: int, error: BadShard) -> BadShard:
        with self._lock:
            if shard_index not in self.bad_shards:
                self.bad_shards[shard_index] = self._new_bad[shard_index] = error.reason
            self._open.pop(shard_index, None)
        return error

    def _stored(self) -> Storage:
        if self._storage is None:
            self._storage = Storage(self.shards_url)
        return self._storage

    def _cached(self) -> ShardCache:
        with self._lock:
            if self._cache is None:
                self._cache = ShardCache(self.cache_settings, self._counts)
            return self._cache
