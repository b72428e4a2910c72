"""Files of a dataset at a path or any fsspec URL: bounded reads, tried again where that can help, by a deadline."""

import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data.counts import Counts
from data.schema import Shard
from trainer import metric_names
from trainer.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
DEADLINE_S = 300.0
"""Longest time for one file, all attempts together."""
STALL_S = 60.0
"""Longest wait for one range of a file; then another connection is tried."""
ATTEMPTS_AT_HANGING = 3
"""Storage that hangs is asked so often within a deadline."""
_RANGES_AT_ONCE = 4
"""One connection to an object store gives 40 to 90 MB/s."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_ATTEMPTS_AT_BAD = 3


class StorageError(OSError):
    """Storage did not answer, or not in time: not the user's doing, and worth a restart."""


class BadShard(UserError):
    """A shard that no trying again brings. A run may go on without it."""

    reason: ClassVar[str] = "damaged_shard"
    """Fit to label a count."""


class DamagedShard(BadShard):
    """Size or hash are not what the index says."""


class MissingShard(BadShard):
    reason = "missing_shard"


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
        return with_retries(attempt, f"{self.url}/{name}", deadline_s)

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
        info = _wait(_begin(lambda: self.fs.info(path)), deadline, stall_s)
        check_size_of(num_bytes, info.get("size"), f"{self.url}/{name}")
        starts = iter(range(0, num_bytes, CHUNK_BYTES))
        pending: deque[tuple[int, _Answer]] = deque()
        while True:
            for start in itertools.islice(starts, _RANGES_AT_ONCE - len(pending)):
                end = min(start + CHUNK_BYTES, num_bytes)
                pending.append((end - start, _begin(partial(self.fs.cat_file, path, start=start, end=end))))
            if not pending:
                return
            size, answer = pending.popleft()
            data = _wait(answer, deadline, stall_s)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            yield data

    def read_range(
        self, name: str, start: int, end: int, *, deadline_s: float = DEADLINE_S, counts: Counts | None = None
    ) -> bytes:
        """Bytes `start` to `end - 1` of a file that has them.

        Raises:
            BadShard: missing, or too short.
            UserError: access is denied.
            StorageError: storage fails for longer than the deadline.
        """
        path, where = self.path(name), f"{self.url}/{name}"

        def attempt(deadline: float) -> bytes:
            began = time.monotonic()
            read = partial(self.fs.cat_file, path, start=start, end=end)
            try:
                data = bytes(_wait(_begin(read), deadline, deadline_s / ATTEMPTS_AT_HANGING))
            except FileNotFoundError:
                raise missing_shard(where) from None
            if len(data) != end - start:
                raise DamagedShard(f"{where}: ends before byte {end}; copy the shard again or build the dataset again")
            if counts:
                counts.add(metric_names.FETCH_BYTES, len(data))
                counts.add(metric_names.FETCH_SECONDS, time.monotonic() - began)
            return data

        return with_retries(attempt, where, deadline_s, counts=counts)

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

        with_retries(attempt, f"{self.url}/{name}", deadline_s)

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


def missing_shard(where: str) -> "MissingShard":
    return MissingShard(f"{where}: missing, though the index names it; upload it again or build the dataset again")


def check_size_of(expected: int, found: int | None, where: str) -> None:
    """
    Raises:
        DamagedShard: a file is not as large as its index says; storage may not tell, then it is not known yet.
    """
    if found is not None and found > expected:
        raise DamagedShard(f"{where}: larger than the {expected} bytes it may have; build the dataset again")
    if found is not None and found < expected:
        raise DamagedShard(f"{where}: has {found} bytes, the index says {expected}; copy the shard again or "
                        "build the dataset again")  # fmt: skip


def check(shard: Shard, num_bytes: int, digest: str, where: str) -> None:
    """
    Raises:
        DamagedShard: size or hash are not what the index says.
    """
    check_size_of(shard.num_bytes, num_bytes, where)
    if digest != shard.hash:
        raise DamagedShard(f"{where}: its hash is not the index's, the file is damaged; copy the shard again or build "
                        "the dataset again")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ deadlines


_Answer: TypeAlias = "queue.SimpleQueue[tuple[Any, BaseException | None]]"


def _begin(function: Callable[[], Any]) -> _Answer:
    """Call it in a thread: what hangs there cannot be interrupted, only left behind."""
    answer: _Answer = queue.SimpleQueue()

    def call() -> None:
        try:
            answer.put((function(), None))
        except BaseException as e:  # raised again by whoever waits
            answer.put((None, e))

    threading.Thread(target=call, name="storage", daemon=True).start()
    return answer


def _wait(answer: _Answer, deadline: float, stall_s: float) -> Any:
    """
    Raises:
        TimeoutError: nothing came until `deadline`, or for `stall_s`.
    """
    try:
        value, error = answer.get(timeout=max(0.0, min(stall_s, deadline - time.monotonic())))
    except queue.Empty:
        raise TimeoutError("no answer in time") from None
    if error is not None:
        raise error
    return value


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


def with_retries(attempt: Callable[[float], T], where: str, deadline_s: float, *, counts: Counts | None = None) -> T:
    """`attempt(deadline)` until it works; pauses double, with jitter. What trying again cannot mend is raised at once."""
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
                raise UserError(f"{where}: access denied ({e}); check the credentials and permissions") from None
            if isinstance(e, FileNotFoundError):
                raise
            if isinstance(e, BadShard):  # a transfer may have been cut short; storage that is damaged stays so
                bad += 1
                if bad == _ATTEMPTS_AT_BAD:
                    raise
            elif time.monotonic() + pause >= deadline:
                raise StorageError(f"{where}: not read within {deadline_s:.0f} s ({type(e).__name__}: {e})") from e
        time.sleep(max(0.0, min(pause * jitter.uniform(0.5, 1.5), deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
