"""One piece of work in a thread, beside training."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One piece of work at a time, in a thread that does not keep the process alive."""

    def __init__(self, name: str) -> None:
        """`name`: of the thread, as a dump of all stacks shows it."""
        self._name = name
        self._future: Future[T] | None = None

    def start(self, work: Callable[[], T]) -> None:
        assert self._future is None, "the one before has not been collected"
        self._future = future = Future[T]()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as e:  # whatever it was, whoever collects the work is told
                future.set_exception(e)

        threading.Thread(target=run, name=self._name, daemon=True).start()

    @property
    def running(self) -> bool:
        return self._future is not None and not self._future.done()

    @property
    def failed(self) -> bool:
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def wait(self, timeout_s: float) -> None:
        """Until the work has ended, one way or the other, but no longer than this."""
        if self._future is not None:
            wait_for([self._future], timeout=timeout_s)

    def collect(self) -> T | None:
        """Wait for the work and return its result, once; None where there is none. Raises what it raised."""
        if self._future is None:
            return None
        future, self._future = self._future, None
        return future.result()
