"""Calls that may hang, each with a deadline: made by a thread, because what hangs cannot be interrupted, only left behind.

What is left behind may still happen, as long as the process lives: a caller that goes on must be right either way. The thread
is a daemon: it holds up no exit.
"""

import math
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

T = TypeVar("T")


class Call(Generic[T]):
    """A call that has begun.

    Args:
        what: names the thread, for whoever looks at a process that waits.
    """

    def __init__(self, function: Callable[[], T], what: str) -> None:
        self._function = function
        self._answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=what, daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer.put((self._function(), None))
        except BaseException as e:  # raised again by whoever waits
            self._answer.put((None, e))

    def wait(self, deadline: float, stall_s: float = math.inf) -> T:
        """What it returns or raises; ask once.

        Args:
            deadline: `time.monotonic()` at the end.
            stall_s: longest wait from now.

        Raises:
            TimeoutError: it has not returned in time.
        """
        try:
            value, error = self._answer.get(timeout=max(0.0, min(stall_s, deadline - time.monotonic())))
        except queue.Empty:
            raise TimeoutError("no answer in time") from None
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]


def call_within(function: Callable[[], T], deadline: float, what: str, stall_s: float = math.inf) -> T:
    """`function()`, left behind at the deadline, a `time.monotonic()`, or after `stall_s`.

    Raises:
        TimeoutError: it has not returned in time.
    """
    return Call(function, what).wait(deadline, stall_s)


def chunks_within(
    open_file: Callable[[], BinaryIO], size: int, deadline: float, what: str, stall_s: float = math.inf
) -> Iterator[bytes]:
    """A file's content in chunks of `size` bytes at most, read by one thread ahead of who uses it.

    Raises:
        TimeoutError: it does not go on for `stall_s`, or until the deadline, a `time.monotonic()`.
    """
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
            with open_file() as file:
                while chunk := file.read(size):
                    if not put(chunk):
                        return
            put(b"")
        except Exception as e:  # raised again by the reader of the queue
            put(e)

    threading.Thread(target=read, name=what, daemon=True).start()
    try:
        while True:
            try:
                item = chunks.get(timeout=max(0.0, min(stall_s, deadline - time.monotonic())))
            except queue.Empty:
                raise TimeoutError("no answer in time") from None
            if isinstance(item, Exception):
                raise item
            if not item:
                return
            yield item
    finally:
        left.set()


@contextmanager
def own_name(file: Path) -> Iterator[Path]:
    """A file under a name of this call's own: one that was left behind must not read what the name stands for by then."""
    own = file.with_name(f".{secrets.token_hex(4)}.{file.name}")
    try:
        try:
            os.link(file, own)
        except OSError:  # a file system without links
            shutil.copyfile(file, own)
        yield own
    finally:
        own.unlink(missing_ok=True)
