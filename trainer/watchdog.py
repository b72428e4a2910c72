"""The watchdog: a rank that makes no step any more says where it is stuck, and ends, so that its job starts again.

Why not in the training thread: a hung collective, read or kernel never returns to Python, so no handler and no check of ours
would run there. Three watches, each for what the one before cannot see:

1. a thread in each rank, with a limit from the measured step times: writes all stacks, ends the process with ExitCode.HANG;
2. the watchdogs of the other ranks (`watchdog_peers`): one calls all, so that the stacks of all ranks are of one moment, and
   says which rank did not answer: it is stopped, or its node is gone;
3. two timers that need no interpreter (faulthandler's thread, SIGALRM's default action), for a rank whose native code never
   gives the interpreter's lock back. Its stacks are in its log only.

Time in which the process did not run at all (SIGSTOP, `scontrol suspend`) does not count for the first.
"""

import faulthandler
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NoReturn

from trainer.background import Background
from trainer.config import WatchdogConfig
from trainer.errors import ExitCode, one_line
from trainer.run_folder import HANGS, STACKS, RunFolder
from trainer.watchdog_peers import Peers

_TICK_S = 1.0
_SUSPENDED_S = 3.0
"""Longer between two ticks than it should be, and the process has not run meanwhile."""
_MEASURED_STEPS = 3
"""Timed steps before there is a limit from them."""
_LAST_STEPS = 50
"""Steps that the median is taken over."""
_WITHOUT_INTERPRETER_S = 5.0
"""After the limit: when the timers that need no interpreter are due."""
_TO_WRITE_S = 1.0
"""Between the two of them: for the stacks to be written."""
STORAGE_S = 20.0
"""Longest that hung storage may hold up the end."""
_END_S = 60.0
"""Longest that the end itself may take."""


@dataclass(frozen=True)
class Now:
    """What the training thread does, since when, and how long it may."""

    doing: str
    since: float
    """Of the monotonic clock, in seconds."""
    limit_s: float


class Watchdog:
    """Use as a context manager, around all that a rank does. Where `config` is None it does nothing.

    The training thread says what it does; each such word takes well under a microsecond, a step's about ten.
    """

    def __init__(
        self, config: WatchdogConfig | None, folder: RunFolder | None, *, rank: int = 0, size: int = 1
    ) -> None:
        assert config is None or folder is not None
        self._config = config
        self._folder, self._rank, self._size = folder, rank, size
        self.attempt = 0
        self._peers: Peers | None = None
        self._floor_s = config.min_s if config else 0.0
        self._seconds: deque[float] = deque(maxlen=_LAST_STEPS)
        self._kinds: set[Hashable] = set()
        self._fresh = True
        self._phase = -1
        self._step: int | None = None
        self._armed_until = 0.0
        self._arming = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._asked_by: str | None = None
        self._firing = False
        self._now = Now("starting", time.monotonic(), config.first_step_s if config else 0.0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._config:
            # the process may have been started by one that ignores it
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._now = replace(self._now, since=time.monotonic())
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. Where this rank or another has been found hanging, wait for this process's end instead: an error
        that comes of it, a connection that another rank has closed, is not the reason to give."""
        if self._config is None:
            return
        if self._firing:
            self._thread.join(_END_S)
        self._closed = True
        self._wake.set()
        self._thread.join(_TICK_S)
        if self._peers:
            self._peers.close()
        with self._arming:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def begin_attempt(self, attempt: int) -> None:
        """From now on the watchdogs of the job's ranks hear each other. `attempt`: the same on all ranks, new at each start."""
        self.attempt = attempt
        if self._config and self._size > 1:
            self._peers = Peers(self._rank, self._size, attempt, self._asked)

    def never_below(self, seconds: float) -> None:
        """A deadline within a step that says more when it passes: the limit of a step stays above it."""
        self._floor_s = max(self._floor_s, seconds)

    # ------------------------------------------------------------------------------------- said by the training thread

    def doing(self, what: str, *, step: bool = False) -> None:
        """What the training thread does from now on, in words; `step`: it belongs to a step, else it is between steps."""
        if self._config:
            self._set(what, self._step_limit_s() if step else max(self._config.between_steps_s, self._floor_s))

    def loading(self, *, fresh: bool = False) -> None:
        """Waiting for a batch; `fresh`: the first of a loader, whose workers are being started."""
        self._fresh = self._fresh or fresh
        if self._config:
            self._set("waiting for data", self._first_step_s() if self._fresh else self._step_limit_s())

    def loaded(self) -> None:
        """The batch is there; are those of the other ranks?"""
        self._set("waiting for the other ranks' data", self._now.limit_s)

    def stepping(self, phase: int, *kind: Hashable) -> bool:
        """Computing a step. Returns whether it is the first of its kind in a phase, of its batch's shape, which may have to
        compile."""
        if phase != self._phase:
            # steps take another time from now on
            self._seconds.clear()
            self._phase = phase
        self._fresh = (phase, kind) not in self._kinds
        self._kinds.add((phase, kind))
        if self._config:
            self._set("computing a step", self._first_step_s() if self._fresh else self._step_limit_s())
        return self._fresh

    def stepped(self, step: int, seconds: float) -> None:
        """A step is done: `step` of them in the run so far, this one in so many seconds."""
        self._step = step
        if not self._fresh:
            self._seconds.append(seconds)
        self._fresh = False

    def _set(self, what: str, limit_s: float) -> None:
        if self._config is None:
            return
        now = time.monotonic()
        self._now = Now(what, now, limit_s)
        # a longer limit cannot wait for the next tick: what begins here may keep the interpreter's lock
        if now + limit_s > self._armed_until:
            self._arm()

    def _first_step_s(self) -> float:
        assert self._config
        return max(self._config.first_step_s, self._step_limit_s() if self._seconds else self._floor_s)

    def _step_limit_s(self) -> float:
        assert self._config
        if len(self._seconds) < _MEASURED_STEPS:
            return max(self._config.first_step_s, self._floor_s)
        return max(self._floor_s, self._config.factor * statistics.median(self._seconds))

    # -------------------------------------------------------------------------------------------------------- the watch

    def _asked(self, by: str) -> None:
        """Another rank has called."""
        self._asked_by = by
        self._wake.set()

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._closed:
            self._arm()
            self._wake.wait(_TICK_S)
            if self._closed:
                return
            now, state = time.monotonic(), self._now
            asleep_s, seen = now - seen - _TICK_S, now
            if asleep_s > _SUSPENDED_S:
                state = replace(state, since=min(now, state.since + asleep_s))
                self._now = state
            if self._asked_by is not None or now - state.since > state.limit_s:
                self._fire(state, now - state.since)

    def _arm(self) -> None:
        """Set the timers that need no interpreter."""
        with self._arming:
            if self._closed or self._firing:
                return
            state = self._now
            until = state.since + state.limit_s + _WITHOUT_INTERPRETER_S
            if abs(until - self._armed_until) < _TICK_S:
                return
            self._armed_until = until
            left_s = max(until - time.monotonic(), 1.0)
            faulthandler.dump_traceback_later(left_s, file=2)
            signal.setitimer(signal.ITIMER_REAL, left_s + _TO_WRITE_S)

    def _fire(self, state: Now, silent_s: float) -> NoReturn:
        """Say where all threads are, in the log and in the run folder; call the other ranks; end."""
        with self._arming:
            self._firing = True
            # even this end must end
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, _END_S)
        after = "before the first step" if self._step is None else f"after step {self._step}"
        what = f"{silent_s:.0f} s without a step {after}, limit {round(state.limit_s, 1):g} s, while {state.doing}"
        asked_by = self._asked_by
        where = f"rank {self._rank} of {self._size} on {platform.node()}, process {os.getpid()}, start {self.attempt}"
        reason = "" if asked_by is None else f"called by {asked_by}\n"
        text = f"==== watchdog: {where}\n{what}\n{reason}\n{stacks()}\n"
        _log(text)
        name = f"{STACKS}/{self.attempt:04d}-rank-{self._rank}.txt"
        writing: Background[None] = Background("stacks to the run folder")
        folder = self._folder
        assert folder is not None
        writing.start(lambda: folder.write_text(name, text))
        missing = self._peers.call(f"rank {self._rank}: {what}") if self._peers else []
        if asked_by is None:
            record = {
                "time": time.time(), "step": self._step, "doing": state.doing, "silent_s": silent_s,
                "limit_s": state.limit_s, "rank": self._rank, "unanswered": missing,
            }  # fmt: skip
            recording: Background[None] = Background("record to the run folder")
            recording.start(lambda: folder.write_json(f"{HANGS}/{self.attempt:04d}.json", record))
            recording.wait(STORAGE_S)
        writing.wait(STORAGE_S)
        stored = f"stacks in {folder.url}/{STACKS}"
        try:
            if writing.running:
                stored = f"storage did not take the stacks within {STORAGE_S:.0f} s, they are in the log"
            else:
                writing.collect()
        except Exception as e:  # the end must come, whatever storage says
            stored = f"storage did not take the stacks ({one_line(e)}), they are in the log"
        unanswered = "; rank 0, or torchrun, who holds the ranks' store, does not answer" if missing is None else ""
        if missing:
            unanswered = f"; no answer from rank {', '.join(map(str, missing))}"
        _log(f"error: hang: {what if asked_by is None else asked_by}{unanswered}; {stored}\n")
        if self._peers:
            self._peers.let_others_go_first()
        os._exit(ExitCode.HANG)


def stacks() -> str:
    """Of all threads of this process, the most recent call first. Reads no source files: their storage may be what hangs."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode(errors="replace")
    for thread in threading.enumerate():
        text = text.replace(f"hread 0x{thread.ident:016x}", f"hread {thread.name}")
    return text


def _log(text: str) -> None:
    """Past Python's own stream, whose lock a stuck thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())
