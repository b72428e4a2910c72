"""Shards of remote datasets on a node's disk: bounded, shared by all its processes, and whole or not there.

    CACHE/shards/URL/HASH-NAME          a shard; it was verified, flushed to disk and then renamed to this
    CACHE/shards/URL/.HASH-NAME.tmp     one on its way
    CACHE/verified/FILE                 a mark: this file was verified, and when it was last opened
    CACHE/.room                         bytes of all shards; locked by who counts and removes

Locks are `flock` on the files themselves, which the kernel frees when a process dies: who reads a shard shares its
lock, who fetches one has the temporary file's alone, and only what nobody has locked is removed. So a killed process
leaves nothing that blocks another, and its temporary files can be told from those of the living.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data.counts import Counts
from data.schema import Shard
from data.storage import (
    ATTEMPTS_AT_HANGING,
    DEADLINE_S,
    BadShard,
    Storage,
    StorageError,
    check,
    error_class,
    missing_shard,
    with_retries,
)
from data.verified import HeldFile, Marks, cache_folder, writing
from trainer import metric_names
from trainer.errors import UserError

_SHARE_OF_FREE_DISK = 0.8
_POLL_S = 0.03
_GIB = 1 << 30
_HEADROOM = 0.05
"""Evicted beyond what is needed, as a share of the limit, so that not every fetch looks through the whole cache."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheFull(UserError):
    """Everything in the cache is in use, and there is no room for more."""


@dataclass(frozen=True)
class CacheSettings:
    folder: str | None = None
    """The system's cache folder when absent."""
    gib: float | None = None
    """Absent: 80 % of what the disk has free."""


class ShardCache:
    """One process's view of a node's cache."""

    def __init__(self, settings: CacheSettings, counts: Counts) -> None:
        """
        Raises:
            UserError: the folder cannot be made or belongs to someone else.
        """
        self.folder = cache_folder(settings.folder)
        self.marks = Marks(self.folder)
        self._max_bytes = None if settings.gib is None else int(settings.gib * _GIB)
        self._counts = counts
        self._swept = False

    def limit_bytes(self, total: int | None = None) -> int:
        """What all shards together may take. `total`: what they take now, where it is known."""
        if self._max_bytes is not None:
            return self._max_bytes
        with writing(self.folder):
            free = shutil.disk_usage(self.folder).free
        return int(_SHARE_OF_FREE_DISK * (free + (self._count() if total is None else total)))

    def open(
        self, storage: Storage, shard: Shard, *, deadline_s: float = DEADLINE_S, wait: bool = True
    ) -> HeldFile | None:
        """A shard's file, fetched unless it is there. Of many processes one fetches, and the others wait for it.

        Args:
            wait: False: None where another process is fetching it.

        Raises:
            BadShard: storage has none, or a damaged one, however often it is fetched.
            CacheFull: no room, as everything is in use.
            UserError: access is denied, or the folder cannot be written.
            StorageError: storage fails for longer than the deadline.
        """
        if not self._swept:
            self.sweep()
            self._swept = True
        path = self.place(storage.url, shard)
        deadline = time.monotonic() + deadline_s
        while True:
            if held := self._open_cached(path, shard):
                self._counts.add(metric_names.CACHE_HITS)
                return held
            temporary = path.with_name(f".{path.name}.tmp")
            descriptor = self._own_temporary(temporary, path)
            if descriptor is not None:
                self._counts.add(metric_names.CACHE_MISSES)
                # who has waited in vain for another's fetch still has time for one of its own
                left_s = max(deadline - time.monotonic(), deadline_s / ATTEMPTS_AT_HANGING)
                return self._fetch(descriptor, temporary, path, storage, shard, left_s)
            if not wait:
                return None
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"{storage.url}/{shard.name}: another process has been fetching it for {deadline_s:.0f} s"
                )
            time.sleep(_POLL_S)

    def place(self, url: str, shard: Shard) -> Path:
        """By its full URL, because base names repeat, and by its hash, because data changes."""
        folder = self.folder / "shards" / hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
        return folder / f"{shard.hash}-{shard.name.replace('/', '-')}"

    def sweep(self) -> None:
        """Remove what killed processes have left half-written."""
        for path in (self.folder / "shards").glob("*/.*.tmp"):
            if path.is_symlink():  # nobody's of ours
                path.unlink(missing_ok=True)
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                if self._lock(descriptor, fcntl.LOCK_EX) and _is(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)
        self.marks.sweep()

    # --------------------------------------------------------------------------------------------------- one shard

    def _open_cached(self, path: Path, shard: Shard) -> HeldFile | None:
        """A shard that is there, locked against removal; None where it is not, or its content has rotted."""
        with writing(self.folder):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
        held = HeldFile(descriptor, path)
        if not self._lock(descriptor, fcntl.LOCK_SH) or not _is(descriptor, path):
            return None  # it is being removed
        try:
            self.marks.verify(path, shard)
        except BadShard as e:
            self._counts.add(metric_names.FETCH_ERRORS, 1, error_class(e))
            if _is(descriptor, path):
                with writing(self.folder):
                    path.unlink(missing_ok=True)
            return None
        self.marks.touch(path)
        return held

    def _own_temporary(self, temporary: Path, path: Path) -> int | None:
        """Open a shard's temporary file for us alone; None where another has it, or the shard is there by now."""
        with writing(self.folder):
            temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        # Whoever had it before has renamed or removed it: then the name is another file's by now, or nobody's.
        ours = self._lock(descriptor, fcntl.LOCK_EX) and _is(descriptor, temporary)
        if ours and not path.exists():
            return descriptor
        if ours:
            temporary.unlink()
        os.close(descriptor)
        return None

    def _fetch(
        self, descriptor: int, temporary: Path, path: Path, storage: Storage, shard: Shard, deadline_s: float
    ) -> HeldFile:
        began = time.monotonic()
        where = f"{storage.url}/{shard.name}"
        held = HeldFile(descriptor, path)

        def attempt(deadline: float) -> None:
            hasher, position = xxhash.xxh64(), 0
            storage.fs.invalidate_cache(storage.path(shard.name))
            stall_s = deadline_s / ATTEMPTS_AT_HANGING
            try:
                for chunk in storage.ranges(shard.name, shard.num_bytes, deadline, stall_s=stall_s):
                    hasher.update(chunk)
                    self._write(descriptor, chunk, position, deadline)
                    position += len(chunk)
            except FileNotFoundError:
                raise missing_shard(where) from None
            check(shard, position, hasher.hexdigest(), where)

        try:
            self._make_room(descriptor, shard.num_bytes, began + deadline_s)
            with_retries(attempt, where, deadline_s, counts=self._counts)
            with writing(self.folder):
                os.fsync(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.replace(temporary, path)
                self.marks.set(path, self.marks.of(path, shard))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._counts.add(metric_names.FETCH_SECONDS, time.monotonic() - began)
        self._counts.add(metric_names.FETCH_BYTES, shard.num_bytes)
        return held

    def _write(self, descriptor: int, data: bytes, position: int, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(descriptor, view, position)
            except OSError as e:
                if e.errno in _FULL and self._free_some(len(view), deadline):
                    continue
                self._raise(e)
            view, position = view[written:], position + written

    def _raise(self, error: OSError) -> None:
        raise UserError(
            f"data.cache_dir: {self.folder} cannot be written ({error.strerror}); free space, set data.cache_gib, or "
            "name another folder"
        ) from None

    # -------------------------------------------------------------------------------------------------------- room

    def _make_room(self, descriptor: int, num_bytes: int, deadline: float) -> None:
        """Remove the shards that were used longest ago until there is room; `descriptor`'s file is then counted in full.

        Raises:
            CacheFull: everything is in use.
        """
        with self._alone(deadline) as room:
            total = self._total(room)
            if total + num_bytes > self.limit_bytes(total):
                total = self._count()
                limit = self.limit_bytes(total)
                total -= self._evict(total + num_bytes - int((1 - _HEADROOM) * limit))
                if total + num_bytes > limit:
                    raise CacheFull(
                        f"data.cache_gib: the shards in use and the next take {(total + num_bytes) / _GIB:.3g} GiB, "
                        f"{self.folder} may hold {limit / _GIB:.3g}; raise it, free disk, or lower "
                        "data.shuffle_window_shards"
                    )
            with writing(self.folder):
                os.ftruncate(descriptor, num_bytes)
                os.pwrite(room, b"%20d" % (total + num_bytes), 0)
        self._counts.set(metric_names.CACHE_BYTES, total + num_bytes)

    def _free_some(self, num_bytes: int, deadline: float) -> bool:
        """The disk is full, whatever the limit says."""
        with self._alone(deadline):
            return self._evict(num_bytes) > 0

    def _evict(self, num_bytes: int) -> int:
        """Remove shards that nobody has open, least recently used first; returns the bytes that went."""
        freed = 0
        for path in sorted((path for _, path in self._files() if path.suffix != ".tmp"), key=self.marks.last_use):
            if freed >= num_bytes:
                break
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                if self._lock(descriptor, fcntl.LOCK_EX) and _is(descriptor, path):
                    freed += os.fstat(descriptor).st_size
                    path.unlink()
                    self.marks.remove(path)
                    self._counts.add(metric_names.CACHE_EVICTIONS)
            finally:
                os.close(descriptor)
        return freed

    def _total(self, room: int) -> int:
        """Bytes of all shards, as the last process to change it has left it. What died since may be counted: too much is
        found out when there is no room, and counted anew."""
        text = os.pread(room, 20, 0)
        return int(text) if text.strip().isdigit() else self._count()

    def _count(self) -> int:
        return sum(size for size, _ in self._files())

    def _files(self) -> Iterator[tuple[int, Path]]:
        """(bytes, path) of all shards, also of those on their way."""
        for folder in (self.folder / "shards").glob("*"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        yield entry.stat(follow_symlinks=False).st_size, Path(entry.path)
                    except FileNotFoundError:
                        continue

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[int]:
        """Of a node's processes one at a time counts and removes. Gives the open file that holds the count."""
        with writing(self.folder):
            room = os.open(self.folder / ".room", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not self._lock(room, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    raise StorageError(f"{self.folder}: another process has been making room for too long")
                time.sleep(_POLL_S)
            yield room
        finally:
            os.close(room)

    def _lock(self, descriptor: int, how: int) -> bool:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as e:
            raise UserError(
                f"data.cache_dir: files in {self.folder} cannot be locked ({e.strerror}); name a folder on a local disk"
            ) from None
        return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
