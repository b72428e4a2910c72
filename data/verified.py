"""Files on the local disk whose content was verified: read once to hash them, and from then on by row."""

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from data.schema import Shard
from data.storage import CHUNK_BYTES, MissingShard, check, check_size_of
from trainer.errors import UserError

_MARK_OF_THE_DEAD_S = 3600.0
_HASH_DEADLINE_S = 300.0
_POLL_S = 0.03


class ChangedFile(Exception):
    """A file is shorter than it was when it was verified."""


class HeldFile:
    """An open file of verified content. While one refers to it, nothing removes it from the cache."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self.path = descriptor, path

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end - 1`. Threads may share the file.

        Raises:
            ChangedFile: it ends before.
        """
        data = os.pread(self._descriptor, end - start, start)
        if len(data) != end - start:
            raise ChangedFile(f"{self.path}: ends before byte {end}")
        return data

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]
        close(self._descriptor)


def open_local(path: Path, shard: Shard, marks: "Marks", *, wait: bool = True) -> HeldFile | None:
    """A shard of a local dataset, verified unless it was before; without `wait` None where another process is at that.

    Raises:
        BadShard: it is missing or damaged.
    """
    if not marks.verify(path, shard, wait=wait):
        return None
    try:
        return HeldFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)
    except OSError as e:
        raise unreadable(path, e) from None


def verify_file(path: Path, shard: Shard) -> None:
    """Read a local shard and compare size and hash with the index.

    Raises:
        BadShard: they differ, or the file cannot be read.
    """
    hasher = xxhash.xxh64()
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            check_size_of(shard.num_bytes, num_bytes, str(path))
            while chunk := file.read(CHUNK_BYTES):
                hasher.update(chunk)
    except OSError as e:
        raise unreadable(path, e) from None
    check(shard, num_bytes, hasher.hexdigest(), str(path))


def unreadable(path: Path, error: OSError) -> MissingShard:
    return MissingShard(f"{path}: the shard cannot be read ({error.strerror}); copy or build the dataset again")


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


class Marks:
    """Which files were verified on this node, so that of its many workers one reads each shard to hash it.

    A mark holds what changes when a file is written: size, times, inode. A file that no longer fits its mark is
    verified again. A mark's own time is when its file was last opened.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "verified"
        with writing(cache):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def holds(self, path: Path, shard: Shard) -> bool:
        try:
            return bool(self._file(path).read_text() == self.of(path, shard))
        except FileNotFoundError:
            return False

    def set(self, path: Path, mark: str) -> None:
        file = self._file(path)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        with writing(self._folder):
            temporary.write_text(mark)
            os.replace(temporary, file)

    def verify(self, path: Path, shard: Shard, *, wait: bool = True) -> bool:
        """Verify a file unless marked, then mark it. Of a node's processes one reads it, and the others wait.

        Args:
            wait: False: False where another process is at it.

        Raises:
            BadShard: it is missing or damaged.
        """
        try:
            mark = self.of(path, shard)
        except OSError as e:
            raise unreadable(path, e) from None
        deadline = time.monotonic() + _HASH_DEADLINE_S
        while not self.holds(path, shard):
            # At the deadline it is read here too: the other one may hang.
            with self._lock_of(path) as ours:
                if ours or time.monotonic() > deadline:
                    if not self.holds(path, shard):
                        verify_file(path, shard)
                        self.set(path, mark)  # of before the hash: a write meanwhile leaves a mark that does not fit
                    return True
            if not wait:
                return False
            time.sleep(_POLL_S)
        return True

    @contextmanager
    def _lock_of(self, path: Path) -> Iterator[bool]:
        """Whether no other process has it. One of few files that stay, and are freed by the kernel if we are killed."""
        with writing(self._folder):
            name = self._folder / f".{self._file(path).name[:2]}.lock"
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = True
            except BlockingIOError:
                ours = False
            yield ours
        finally:
            os.close(descriptor)

    def touch(self, path: Path) -> None:
        """The file was opened."""
        try:
            os.utime(self._file(path))
        except FileNotFoundError:  # another process has removed it since
            return

    def last_use(self, path: Path) -> float:
        """When the file was last opened, or came."""
        for file in (self._file(path), path):
            try:
                return file.stat().st_mtime
            except FileNotFoundError:
                continue
        return 0.0

    def remove(self, path: Path) -> None:
        self._file(path).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the half-written marks of killed processes."""
        for file in self._folder.glob(".*.tmp"):
            try:
                if time.time() - file.stat().st_mtime > _MARK_OF_THE_DEAD_S:
                    file.unlink()
            except FileNotFoundError:
                continue

    def _file(self, path: Path) -> Path:
        return self._folder / hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()

    @staticmethod
    def of(path: Path, shard: Shard) -> str:
        stat = path.stat()
        return json.dumps([shard.hash, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tells failures of the local disk from those of the storage that is read at the same time."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"data.cache_dir: {folder} cannot be written ({e.strerror}); free space or name another folder"
        ) from None
