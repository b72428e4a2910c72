"""Files of a dataset at a path or any fsspec URL: bounded reads, tried again where that can help, by a deadline."""

import errno
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data.counts import Counts
from data.deadlines import Call, call_within, chunks_within, own_name
from data.schema import Shard
from trainer import metric_names
from trainer.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
DEADLINE_S = 300.0
"""Longest time for one file, all attempts together."""
LIST_DEADLINE_S = 900.0
"""For a listing: storage gives it by pages, some hundred names each."""
MIN_BYTES_PER_S = 1_000_000
"""Storage that takes a file more slowly is one that hangs."""
STALL_S = 60.0
"""Longest wait for one range of a file; then another connection is tried."""
ATTEMPTS_AT_HANGING = 3
"""Storage that hangs is asked so often within a deadline."""
_RANGES_AT_ONCE = 4
"""One connection to an object store gives 40 to 90 MB/s."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_ATTEMPTS_AT_BAD = 3
_BAD_NAME = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Local errors that trying again does not mend; others, such as ESTALE and EIO of a network mount, it may."""


class StorageError(OSError):
    """Storage did not answer, or not in time: not the user's doing, and worth a restart."""


class DamagedFile(UserError):
    """A small file that is not what it should be, as trying again will tell again; what denies or hangs raises others."""


class AccessDenied(UserError):
    """A policy may be mended, or was wrong for a while: the file may be as good as any."""


class BadShard(UserError):
    """A shard that no trying again brings. A run may go on without it."""

    reason: ClassVar[str] = "damaged_shard"
    """Fit to label a count."""


class DamagedShard(BadShard):
    """Size or hash are not what the index says."""


class MissingShard(BadShard):
    reason = "missing_shard"


class Storage:
    """A folder at a path or URL. Each call has a deadline, on local paths too: a network mount hangs as a server does. Excepted
    are maps of files into memory, where the loader's own deadline counts, and the renaming of a whole folder."""

    mend: ClassVar[str] = "copy the file again or build the dataset again"
    """What helps against a file that is not what it should be."""
    told_by: ClassVar[str] = "the index"
    """What says how large files are."""

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

    def ask(self, function: Callable[[], T], name: str, deadline_s: float, verb: str, num_bytes: int = 0) -> T:
        """`ask` about what is called `name`."""
        return ask(function, f"{self.url}/{name}".rstrip("/"), deadline_s=deadline_s, num_bytes=num_bytes, verb=verb)

    def read(self, name: str, *, max_bytes: int, deadline_s: float = DEADLINE_S) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            DamagedFile: larger than `max_bytes`.
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline.
        """

        def attempt(deadline: float) -> bytes:
            chunks = chunks_within(
                lambda: self.fs.open(self.path(name), "rb"),
                CHUNK_BYTES,
                deadline,
                f"read {name}",
                deadline_s / ATTEMPTS_AT_HANGING,
            )
            data = bytearray()
            for chunk in chunks:
                data += chunk
                if len(data) > max_bytes:
                    raise DamagedFile(f"{self.url}/{name}: larger than the {max_bytes} bytes it may have; {self.mend}")
            return bytes(data)

        if self.is_local:
            return self.ask(lambda: self._read_local(name, max_bytes), name, deadline_s, "read")
        return with_retries(attempt, f"{self.url}/{name}", deadline_s)

    def _read_local(self, name: str, max_bytes: int) -> bytes:
        path = self.path(name)
        try:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        except OSError as e:
            if e.errno in _BAD_NAME:
                raise UserError(f"{path}: cannot be read ({e.strerror})") from None
            raise
        if len(data) > max_bytes:
            raise DamagedFile(f"{path}: larger than the {max_bytes} bytes it may have; {self.mend}")
        return data

    def ranges(self, name: str, num_bytes: int, deadline: float, *, stall_s: float = STALL_S) -> Iterator[bytes]:
        """A whole file in order, read by ranges, a few at a time.

        Args:
            num_bytes: its size, as an index tells it.
            deadline: `time.monotonic()` at the end.
            stall_s: longest wait for one range.

        Raises:
            FileNotFoundError: there is none.
            DamagedShard: it is of another size.
            TimeoutError: no answer in time.
        """
        path = self.path(name)
        info = call_within(lambda: self.fs.info(path), deadline, f"size of {name}", stall_s)
        check_size_of(num_bytes, info.get("size"), f"{self.url}/{name}", type(self))
        starts = iter(range(0, num_bytes, CHUNK_BYTES))
        pending: deque[tuple[int, Call[bytes]]] = deque()
        while True:
            for start in itertools.islice(starts, _RANGES_AT_ONCE - len(pending)):
                end = min(start + CHUNK_BYTES, num_bytes)
                read = partial(self.fs.cat_file, path, start=start, end=end)
                pending.append((end - start, Call(read, f"read {name}")))
            if not pending:
                return
            size, answer = pending.popleft()
            data = answer.wait(deadline, stall_s)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            yield data

    def read_range(
        self,
        name: str,
        start: int,
        end: int,
        *,
        deadline_s: float = DEADLINE_S,
        counts: Counts | None = None,
        check: Callable[[bytes], None] = lambda data: None,
    ) -> bytes:
        """Bytes `start` to `end - 1` of a file that has them.

        Args:
            check: raises DamagedShard where they are not what they should be; then they are read again, as what was cut short.

        Raises:
            BadShard: missing, too short, or as `check` says.
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline.
        """
        path, where = self.path(name), f"{self.url}/{name}"

        def attempt(deadline: float) -> bytes:
            began = time.monotonic()
            read = partial(self.fs.cat_file, path, start=start, end=end)
            try:
                data = bytes(call_within(read, deadline, f"read {name}", deadline_s / ATTEMPTS_AT_HANGING))
            except FileNotFoundError:
                raise missing_shard(where) from None
            if len(data) != end - start:
                raise DamagedShard(f"{where}: ends before byte {end}; {self.mend}")
            check(data)
            if counts:
                counts.add(metric_names.FETCH_BYTES, len(data))
                counts.add(metric_names.FETCH_SECONDS, time.monotonic() - began)
            return data

        return with_retries(attempt, where, deadline_s, counts=counts)

    def put(self, file: Path, name: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Upload a file. Object stores show it only when it is complete.

        Args:
            deadline_s: all attempts together; longer for a large file, see `ask`.

        Raises:
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline, or keeps less than was sent.
        """

        def send() -> None:
            with own_name(file) as own:
                self.fs.put_file(str(own), self.path(name))
                self.fs.invalidate_cache()
                stored, sent = self.fs.info(self.path(name))["size"], own.stat().st_size
            if stored != sent:
                raise OSError(f"{stored} of {sent} bytes arrived")

        self.ask(send, name, deadline_s, "written", file.stat().st_size)

    def names(self, folder: str = "", *, hidden: bool = False, deadline_s: float = LIST_DEADLINE_S) -> list[str]:
        """Names of what lies in a folder, sorted; none where there is no such folder.

        Args:
            hidden: also those that begin with a dot.
        """

        def look() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.path(folder), detail=False)
            except FileNotFoundError:
                return []
            names = (path.rstrip("/").rpartition("/")[2] for path in found)
            return sorted(name for name in names if name and (hidden or not name.startswith(".")))

        return self.ask(look, folder, deadline_s, "listed")

    def exists(self, name: str, *, deadline_s: float = DEADLINE_S) -> bool:
        """Whether there is such a file or folder."""

        def look() -> bool:
            self.fs.invalidate_cache()
            try:
                # Not by `exists`, which some file systems answer with no where they have failed.
                self.fs.info(self.path(name))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return self.ask(look, name, deadline_s, "found")

    def delete(self, name: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Nothing where there is no such file."""

        def remove() -> None:
            self.fs.invalidate_cache()
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

        self.ask(remove, name, deadline_s, "deleted")


def missing_shard(where: str) -> "MissingShard":
    return MissingShard(f"{where}: missing, though the index names it; upload it again or build the dataset again")


def check_size_of(expected: int, found: int | None, where: str, kind: type[Storage] = Storage) -> None:
    """
    Raises:
        DamagedShard: a file is not as large as its index says; storage may not tell, then it is not known yet.
    """
    if found is not None and found > expected:
        raise DamagedShard(f"{where}: larger than the {expected} bytes it may have; {kind.mend}")
    if found is not None and found < expected:
        raise DamagedShard(f"{where}: has {found} bytes, {kind.told_by} says {expected}; {kind.mend}")


def check(shard: Shard, num_bytes: int, digest: str, where: str) -> None:
    """
    Raises:
        DamagedShard: size or hash are not what the index says.
    """
    check_size_of(shard.num_bytes, num_bytes, where)
    if digest != shard.hash:
        raise DamagedShard(f"{where}: its hash is not the index's, the file is damaged; {Storage.mend}")


# --------------------------------------------------------------------------------------------------------------- errors


def error_class(error: BaseException) -> str:
    """`denied`, `missing`, `damaged`, `timeout` or `server`: what kind of failure of storage it is."""
    name = type(error).__name__
    if isinstance(error, PermissionError) or "Credential" in name:
        return "denied"
    if isinstance(error, (FileNotFoundError, MissingShard)):
        return "missing"
    if isinstance(error, BadShard):
        return "damaged"
    return "timeout" if isinstance(error, TimeoutError) or "Timeout" in name else "server"


def deadline_for(num_bytes: int, deadline_s: float = DEADLINE_S) -> float:
    """Seconds for all attempts at moving so many bytes: at least `deadline_s`, and for each attempt what `MIN_BYTES_PER_S`
    takes."""
    return max(deadline_s, ATTEMPTS_AT_HANGING * num_bytes / MIN_BYTES_PER_S)


def ask(
    function: Callable[[], T], where: str, *, deadline_s: float = DEADLINE_S, num_bytes: int = 0, verb: str = "read"
) -> T:
    """`function()`, which talks to storage, with `with_retries`. An attempt that hangs is left behind after a third of the
    time, and may happen later all the same.

    Args:
        num_bytes: that are moved, see `deadline_for`.
        verb: what is not done where it fails, for the error.

    Raises:
        UserError: access is denied.
        StorageError: storage fails for longer than the deadline.
    """
    deadline_s = deadline_for(num_bytes, deadline_s)

    def attempt(deadline: float) -> T:
        return call_within(function, deadline, f"{verb} {where}", deadline_s / ATTEMPTS_AT_HANGING)

    return with_retries(attempt, where, deadline_s, verb=verb)


def with_retries(
    attempt: Callable[[float], T], where: str, deadline_s: float, *, counts: Counts | None = None, verb: str = "read"
) -> T:
    """`attempt(deadline)` until it works; pauses double, with jitter. What trying again cannot mend is raised at once.

    Args:
        verb: what is not done where it fails, for the error.
    """
    deadline = time.monotonic() + deadline_s
    pause = _FIRST_PAUSE_S
    bad = 0
    jitter = random.Random()
    while True:
        try:
            return attempt(deadline)
        except Exception as e:  # storage clients have their own types for a network that fails
            kind = error_class(e)
            if isinstance(e, UserError) and not isinstance(e, BadShard):
                raise
            if counts:
                counts.add(metric_names.FETCH_ERRORS, 1, kind)
            if kind == "denied":
                raise AccessDenied(f"{where}: access denied ({e}); check the credentials and permissions") from None
            if isinstance(e, FileNotFoundError):
                raise
            if isinstance(e, BadShard):  # a transfer may have been cut short; storage that is damaged stays so
                bad += 1
                if bad == _ATTEMPTS_AT_BAD:
                    raise
            elif time.monotonic() + pause >= deadline:
                raise StorageError(f"{where}: not {verb} within {deadline_s:.0f} s ({type(e).__name__}: {e})") from e
        time.sleep(max(0.0, min(pause * jitter.uniform(0.5, 1.5), deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
