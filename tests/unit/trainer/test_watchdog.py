"""What the watchdog allows, what it costs, and that nothing holds it up."""

import re
import signal
import subprocess
import sys
import time

import pytest

from trainer.config import WatchdogConfig
from trainer.errors import ExitCode
from trainer.run_folder import RunFolder
from trainer.watchdog import Watchdog

CONFIG = WatchdogConfig(factor=10, min_s=20, first_step_s=500, between_steps_s=300)


def of(watchdog: Watchdog) -> float:
    return watchdog._now.limit_s


def train(watchdog: Watchdog, steps: int, seconds: float, *, phase: int = 0, first: int = 0) -> list[float]:
    """The limit of each step."""
    limits = []
    for step in range(first, first + steps):
        watchdog.loading()
        watchdog.loaded()
        watchdog.stepping(phase, (8, 3, 64, 64))
        limits.append(of(watchdog))
        watchdog.stepped(step + 1, seconds)
    return limits


@pytest.fixture
def watchdog(tmp_path) -> Watchdog:  # type: ignore[no-untyped-def]
    """Not started: what it would allow."""
    return Watchdog(CONFIG, RunFolder(str(tmp_path)))


def test_the_limit_of_a_step_follows_the_steps_before(watchdog: Watchdog) -> None:
    assert of(watchdog) == 500
    # the first may compile; then three are timed
    assert train(watchdog, 6, 3.0) == [500, 500, 500, 500, 30, 30]
    watchdog.loading()
    assert of(watchdog) == 30, "waiting for data is part of a step"
    assert train(watchdog, 60, 0.5, first=6)[-1] == 20, "never below min_s"


def test_a_phase_and_a_shape_begin_with_a_first_step(watchdog: Watchdog) -> None:
    train(watchdog, 6, 3.0)
    watchdog.stepping(0, (8, 3, 96, 48))
    assert of(watchdog) == 500
    watchdog.stepped(7, 80.0)
    watchdog.stepping(0, (8, 3, 96, 48))
    assert of(watchdog) == 30, "what compiled is no measure of a step"
    assert train(watchdog, 6, 60.0, phase=1, first=8) == [500, 500, 500, 500, 600, 600], "another phase, other steps"


def test_between_steps_there_is_more_time_and_a_deadline_of_data_comes_first(watchdog: Watchdog) -> None:
    train(watchdog, 6, 3.0)
    watchdog.doing("saving")
    assert of(watchdog) == 300
    watchdog.doing("agreeing", step=True)
    assert of(watchdog) == 30
    watchdog.never_below(180)
    watchdog.loading()
    assert of(watchdog) == 180
    watchdog.loading(fresh=True)
    assert of(watchdog) == 500, "workers start"


def test_defaults_leave_slow_runs_alone_and_are_below_the_timeouts_of_collectives(tmp_path) -> None:  # type: ignore[no-untyped-def]
    watchdog = Watchdog(WatchdogConfig(), RunFolder(str(tmp_path)))
    watchdog.never_below(180)
    assert train(watchdog, 6, 2.0)[-1] == 180
    assert train(watchdog, 60, 100.0, phase=1)[-1] == 1000


def test_it_costs_microseconds_a_step(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with Watchdog(CONFIG, RunFolder(str(tmp_path))) as watchdog:
        train(watchdog, 100, 0.1)
        best_s = min(_timed(watchdog) for _ in range(20))
    assert best_s < 100e-6


def _timed(watchdog: Watchdog) -> float:
    started = time.perf_counter()
    train(watchdog, 100, 0.1)
    return (time.perf_counter() - started) / 100


HUNG_STORAGE = """
import sys, time
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from trainer import watchdog
from trainer.config import WatchdogConfig
from trainer.run_folder import RunFolder

class Hung(MemoryFileSystem):
    protocol = "hung"
    def pipe_file(self, *arguments, **named):
        time.sleep(1000)

fsspec.register_implementation("hung", Hung)
watchdog.STORAGE_S = 0.5
with watchdog.Watchdog(WatchdogConfig(min_s=0.5, first_step_s=0.5), RunFolder("hung://run")):
    time.sleep(500)
"""
STUCK_INTERPRETER = """
import ctypes
from trainer import watchdog
from trainer.config import WatchdogConfig
from trainer.run_folder import RunFolder

watchdog._WITHOUT_INTERPRETER_S = 0.5
def never_gives_the_lock_back():
    ctypes.PyDLL(None).sleep(500)

with watchdog.Watchdog(WatchdogConfig(min_s=1, first_step_s=1), RunFolder("memory://run")):
    never_gives_the_lock_back()
"""
DISABLED = """
import time
from trainer import watchdog
with watchdog.Watchdog(None, None) as dog:
    dog.loading(), dog.loaded(), dog.stepping(0, 1), dog.stepped(1, 0.1), dog.doing("saving")
"""


def test_hung_storage_does_not_hold_up_the_end() -> None:
    result = subprocess.run(
        [sys.executable, "-c", HUNG_STORAGE], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == ExitCode.HANG, result.stderr
    assert 'File "<string>", line 17 in <module>' in result.stderr, "the log has the stacks all the same"
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: hang: \d+ s without a step before the first step, limit 0.5 s, while starting; ", last)
    assert last.endswith("storage did not take the stacks within 0 s, they are in the log")


def test_native_code_that_holds_the_interpreter_is_ended_too() -> None:
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", STUCK_INTERPRETER], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == -signal.SIGALRM
    assert "in never_gives_the_lock_back" in result.stderr
    assert time.monotonic() - started < 300


def test_none_watches_nothing() -> None:
    assert subprocess.run([sys.executable, "-c", DISABLED], timeout=300, check=False).returncode == 0
