"""A stage's workers on this machine: processes that are started, watched, replaced when they die, and stopped together."""

import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from data.stages.runner import LEASE_S, Stage, Stopped, Worker
from data.stages.store import StageStore
from trainer.errors import UserError

STOP_S = 20.0
"""How long workers that are asked to stop may take."""
MAX_DEATHS = 100
"""Of workers on this machine before the stage is given up."""


class WorkersFailed(RuntimeError):
    """Workers keep dying, or raised what is no user's error."""


def run_workers(
    stage: Stage,
    url: str,
    *,
    workers: int,
    lease_s: float = LEASE_S,
    tick: Callable[[], None] = lambda: None,
    tick_s: float = 1.0,
    on_death: Callable[[int], None] = lambda deaths: None,
) -> list[str]:
    """Work at a stage until it is done, with `workers` processes; 0: in this one. Returns lines about items that failed.

    Args:
        tick: called every `tick_s` seconds, to show progress.
        on_death: called when a worker has died, with how many have so far.

    Raises:
        UserError: a worker met one.
        Stopped: asked to by SIGTERM.
        KeyboardInterrupt: Ctrl-C; the workers have ended.
        WorkersFailed: too many died.
    """
    if workers == 0:
        return Worker(stage, StageStore(url), lease_s=lease_s).run()
    group = _Group(stage, url, workers, lease_s, on_death)
    with group, _sigterm_raises():
        while not group.ended():
            group.wait(tick_s)
            tick()
        return group.failures()


class _Group:
    def __init__(self, stage: Stage, url: str, workers: int, lease_s: float, on_death: Callable[[int], None]) -> None:
        self._on_death = on_death
        self._arguments = (stage, url, lease_s)
        self._context = multiprocessing.get_context("spawn")  # threads of storage clients do not survive a fork
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._size = workers
        self._results: list[list[str]] = []
        self._deaths = 0

    def __enter__(self) -> "_Group":
        for _ in range(self._size):
            self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process, _ in self._workers:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for process, _ in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_main, args=(*self._arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def ended(self) -> bool:
        """Whether all have; one that died is replaced.

        Raises:
            UserError, WorkersFailed, Stopped: as a worker says.
        """
        for worker in [*self._workers]:
            process, pipe = worker
            # What it says is read before it has ended: a pipe holds 64 KB, and it cannot end before the rest is read.
            if process.is_alive() and not pipe.poll():
                continue
            said = _said(pipe)
            process.join()
            self._workers.remove(worker)
            if said is None:
                self._replace(process)
            else:
                self._results.append(_result(*said))
        return not self._workers

    def _replace(self, died: BaseProcess) -> None:
        self._deaths += 1
        self._on_death(self._deaths)
        code = died.exitcode or 0
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._deaths > MAX_DEATHS:
            raise WorkersFailed(f"{self._deaths} workers have died, the last by {cause}; see above")
        print(f"worker {died.pid} died ({cause}); another takes its place", file=sys.stderr)
        self._start()

    def wait(self, seconds: float) -> None:
        waited = [item for process, pipe in self._workers for item in (process.sentinel, pipe)]
        multiprocessing.connection.wait(waited, timeout=seconds)

    def failures(self) -> list[str]:
        return sorted({line for lines in self._results for line in lines})


def _said(pipe: Connection) -> tuple[str, Any] | None:
    """A worker's last words; None: it died without."""
    with pipe:
        try:
            kind, value = pipe.recv()
            return kind, value
        except (EOFError, OSError):
            return None


def _result(kind: str, value: Any) -> list[str]:
    if kind == "user_error":
        raise UserError(value)
    if kind == "error":
        raise WorkersFailed(value)
    if kind == "stopped":
        raise Stopped
    return list(value)


def _main(stage: Stage, url: str, lease_s: float, pipe: Connection) -> None:
    """A worker process. What it has to say goes through the pipe; nothing means that it died."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; whoever started us says when to stop
    worker = Worker(stage, StageStore(url), lease_s=lease_s)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop.set())
    try:
        pipe.send(("done", worker.run()))
    except Stopped:
        pipe.send(("stopped", None))
    except UserError as e:
        pipe.send(("user_error", str(e)))
    except Exception as e:
        logging.exception("worker")
        pipe.send(("error", f"{type(e).__name__}: {e}"))
    finally:
        pipe.close()
    sys.stdout.flush()
    os._exit(0)  # threads of storage clients may hang


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as `Stopped`, in the main thread; elsewhere nothing changes."""

    def stop(*_: object) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
