"""Files of a dataset at a path or any fsspec URL: bounded reads, and shards brought to local disk and verified.

A remote shard is read under a temporary name, hashed on the way, flushed to disk and renamed, so a file under its
final name in the cache is whole. Every wait has a deadline.
"""

import hashlib
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
import xxhash
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data.schema import Shard
from trainer.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
DEADLINE_S = 300.0
"""Longest time for one file, all attempts together."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_ATTEMPTS_AT_DAMAGED = 3


class StorageError(OSError):
    """Storage did not answer, or not in time: not the user's doing, and worth a restart."""


class DamagedShard(UserError):
    """Size or hash are not what the index says."""


class Storage:
    """A folder at a path or URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs: fsspec.AbstractFileSystem
        try:
            self.fs, root = url_to_fs(self.url)
        except (ValueError, ImportError) as e:
            raise UserError(f"{url}: cannot be opened ({e})") from None
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, *, max_bytes: int, deadline_s: float = DEADLINE_S) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            UserError: larger than `max_bytes`, or access is denied.
            StorageError: storage fails for longer than the deadline.
        """

        def attempt(deadline: float) -> bytes:
            return b"".join(self._chunks(name, max_bytes, deadline))

        if self.is_local:
            return self._read_local(name, max_bytes)
        return _with_retries(attempt, f"{self.url}/{name}", deadline_s)

    def _read_local(self, name: str, max_bytes: int) -> bytes:
        path = self.path(name)
        try:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
        if len(data) > max_bytes:
            raise UserError(f"{path}: larger than the {max_bytes} bytes it may have; build the dataset again")
        return data

    def fetch(self, shard: Shard, target: Path, *, deadline_s: float = DEADLINE_S) -> None:
        """Bring a shard to `target`: whole and verified, or not at all.

        Raises:
            UserError: missing, wrong size or hash, or the local disk is full.
            StorageError: storage fails for longer than the deadline.
        """
        temporary = target.with_name(f".{target.name}.tmp")

        def attempt(deadline: float) -> None:
            hasher, num_bytes = xxhash.xxh64(), 0
            with _writing(target.parent):
                file = open(temporary, "wb")  # noqa: SIM115
            with file:
                for chunk in self._chunks(shard.name, shard.num_bytes, deadline):
                    hasher.update(chunk)
                    num_bytes += len(chunk)
                    with _writing(target.parent):
                        file.write(chunk)
                with _writing(target.parent):
                    file.flush()
                    os.fsync(file.fileno())
            check(shard, num_bytes, hasher.hexdigest(), f"{self.url}/{shard.name}")
            os.replace(temporary, target)

        # Held by whoever fetches, so that a node's workers fetch a shard once; released by the kernel on death.
        with _writing(target.parent):
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        try:
            lock.acquire(timeout=deadline_s)
        except Timeout:
            raise StorageError(f"{self.url}/{shard.name}: another process has been fetching it for {deadline_s:.0f} s"
                               ) from None  # fmt: skip
        try:
            if not target.exists():
                _with_retries(attempt, f"{self.url}/{shard.name}", deadline_s)
        finally:
            temporary.unlink(missing_ok=True)
            lock.release()

    def put(self, file: Path, name: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Upload a file. Object stores show it only when it is complete.

        Raises:
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline, or keeps less than was sent.
        """

        def attempt(_deadline: float) -> None:
            self.fs.put_file(str(file), self.path(name))
            self.fs.invalidate_cache()
            stored, sent = self.fs.info(self.path(name))["size"], file.stat().st_size
            if stored != sent:
                raise OSError(f"{stored} of {sent} bytes arrived")

        _with_retries(attempt, f"{self.url}/{name}", deadline_s)

    def _chunks(self, name: str, max_bytes: int, deadline: float) -> Iterator[bytes]:
        """A file's content. Read by a thread, because a read that hangs cannot be interrupted, only left behind."""
        chunks: queue.Queue[bytes | Exception] = queue.Queue(maxsize=4)
        left = threading.Event()

        def put(item: bytes | Exception) -> bool:
            while not left.is_set():
                try:
                    chunks.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                with self.fs.open(self.path(name), "rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        if not put(chunk):
                            return
                put(b"")
            except Exception as e:  # raised again by the reader of the queue
                put(e)

        threading.Thread(target=read, name=f"read {name}", daemon=True).start()
        num_bytes = 0
        try:
            while True:
                try:
                    item = chunks.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise TimeoutError("no answer in time") from None
                if isinstance(item, Exception):
                    raise item
                if not item:
                    return
                num_bytes += len(item)
                if num_bytes > max_bytes:
                    raise UserError(
                        f"{self.url}/{name}: larger than the {max_bytes} bytes it may have; build the dataset again"
                    )
                yield item
        finally:
            left.set()


def check(shard: Shard, num_bytes: int, digest: str, where: str) -> None:
    """
    Raises:
        DamagedShard: size or hash are not what the index says.
    """
    if num_bytes != shard.num_bytes:
        raise DamagedShard(f"{where}: has {num_bytes} bytes, the index says {shard.num_bytes}; copy the shard again or "
                        "build the dataset again")  # fmt: skip
    if digest != shard.hash:
        raise DamagedShard(f"{where}: its hash is not the index's, the file is damaged; copy the shard again or build "
                        "the dataset again")  # fmt: skip


def verify_file(path: Path, shard: Shard) -> None:
    """Read a local shard and compare size and hash with the index.

    Raises:
        UserError: they differ, or the file cannot be read.
    """
    hasher = xxhash.xxh64()
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes == shard.num_bytes:  # else nothing to hash
                while chunk := file.read(CHUNK_BYTES):
                    hasher.update(chunk)
    except OSError as e:
        raise UserError(f"{path}: the shard cannot be read ({e.strerror}); copy or build the dataset again") from None
    check(shard, num_bytes, hasher.hexdigest(), str(path))


# ---------------------------------------------------------------------------------------------------------------- cache


def cache_folder(configured: str | None) -> Path:
    """Where shards of remote datasets and marks of verified files lie.

    Raises:
        UserError: the folder cannot be made or belongs to someone else.
    """
    if configured:
        folder = Path(configured).expanduser()
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loupe"
        if not _can_make(folder):  # containers often run with a home that is read-only, or none
            folder = Path(tempfile.gettempdir()) / f"loupe-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as e:
        raise UserError(f"data.cache_dir: {folder} cannot be made ({e.strerror}); name a writable folder") from None
    # In a shared folder such as /tmp someone else could have made it, and could swap what it holds.
    if not configured and owner != os.getuid():
        raise UserError(f"data.cache_dir: {folder} belongs to another user; name a folder of your own")
    return folder


def _can_make(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def cached_shard(cache: Path, url: str, shard: Shard) -> Path:
    """Place of a remote shard: by its full URL, because base names repeat, and by its hash, because data changes."""
    return cache / "shards" / hashlib.blake2b(url.encode(), digest_size=12).hexdigest() / f"{shard.hash}-{shard.name}"


class Marks:
    """Which files were verified on this node, so that of its many workers one reads each shard to hash it.

    A mark holds what changes when a file is written: size, times, inode. A file that no longer fits its mark is
    verified again.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "verified"
        with _writing(cache):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def holds(self, path: Path, shard: Shard) -> bool:
        try:
            return bool(self._mark_file(path).read_text() == self._mark(path, shard))
        except FileNotFoundError:
            return False

    def set(self, path: Path, mark: str) -> None:
        file = self._mark_file(path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with _writing(self._folder):
            temporary.write_text(mark)
            os.replace(temporary, file)

    def verify(self, path: Path, shard: Shard) -> None:
        """Verify a file unless marked, then mark it.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            mark = self._mark(path, shard)
        except OSError as e:
            raise UserError(
                f"{path}: the shard cannot be read ({e.strerror}); copy or build the dataset again"
            ) from None
        if not self.holds(path, shard):
            verify_file(path, shard)
            self.set(path, mark)  # of before the hash: a write meanwhile leaves a mark that does not fit

    def _mark_file(self, path: Path) -> Path:
        return self._folder / hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()

    @staticmethod
    def _mark(path: Path, shard: Shard) -> str:
        stat = path.stat()
        return json.dumps([shard.hash, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev])


# --------------------------------------------------------------------------------------------------------------- errors


def _with_retries(attempt: Callable[[float], T], where: str, deadline_s: float) -> T:
    """`attempt(deadline)` until it works; pauses double. What trying again cannot mend is raised at once."""
    deadline = time.monotonic() + deadline_s
    pause = _FIRST_PAUSE_S
    damaged = 0
    while True:
        try:
            return attempt(deadline)
        except FileNotFoundError:
            raise
        except PermissionError as e:
            raise UserError(f"{where}: access denied ({e}); check the credentials and permissions") from None
        except DamagedShard:  # a transfer may have been cut short; storage that is damaged stays so
            damaged += 1
            if damaged == _ATTEMPTS_AT_DAMAGED:
                raise
        except UserError:
            raise
        except Exception as e:  # storage clients have their own types for a network that fails
            if time.monotonic() + pause >= deadline:
                raise StorageError(f"{where}: not read within {deadline_s:.0f} s ({type(e).__name__}: {e})") from e
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tells failures of the local disk from those of the storage that is read at the same time."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"data.cache_dir: {folder} cannot be written ({e.strerror}); free space or name another folder"
        ) from None
