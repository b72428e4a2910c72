"""Runs that `ops.bench.launch` starts, stops and starts again, and when what happened, from the records they keep."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import metric_names
from trainer.config import CODE_ROOT

DEADLINE_S = 1200.0
"""Longest that a start or a stop may take: a compilation on loaded cores."""
_POLL_S = 0.02


@dataclass
class Cycle:
    """A start, a stop by signal after some steps, and the start after it; seconds."""

    first_line: float = 0.0
    """Submission to the first line of rank 0's log."""
    first_step: float = 0.0
    """Submission to the first step's record."""
    durable: float = 0.0
    """Signal to COMMIT."""
    ended: float = 0.0
    """Signal to the end of the job, or until it waits in the queue again."""
    next_step: float = 0.0
    """Signal to the first new step's record."""
    held: float = 0.0
    """Of it, what the scheduler waited."""
    starts: list[dict[str, float]] = field(default_factory=list)
    """`start_seconds` of the two starts' records."""


class LocalRun:
    """By our command on this machine. To go on is to give it again."""

    def __init__(self, run_dir: Path, recipe: str, arguments: Sequence[str]) -> None:
        self.run_dir = run_dir
        self._command = [
            sys.executable, str(CODE_ROOT / "launch/slurm.py"), recipe, "--cluster", "local", "--gpus-per-node", "2", "--cpu",
            "--run-dir", str(run_dir), *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self) -> None:
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.run_dir}.out", "ab") as out:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=self.run_dir.parent,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGTERM)

    def wait_for_end(self) -> None:
        assert self._process
        self._process.wait(timeout=DEADLINE_S)

    def go_on(self) -> float:
        """Returns the seconds that a scheduler has made it wait."""
        self.submit()
        return 0.0

    def check(self) -> None:
        """It must not end by itself."""
        if self._process and self._process.poll() is not None:
            raise RuntimeError(f"{self.run_dir}: ended with {self._process.returncode}, see {self.run_dir}.out")

    def close(self) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its ranks die with it
            self._process.wait()


class SlurmRun:
    """A job of the tests' SLURM, two nodes with a rank each."""

    def __init__(self, cluster: Any, run_dir: Path, recipe: str, arguments: Sequence[str]) -> None:
        assert recipe == "demo", "what the tests' SLURM submits"
        self._cluster, self.run_dir, self._arguments = cluster, run_dir, arguments
        self._job = ""

    def submit(self) -> None:
        from tests.slurm_jobs import submit

        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._job = submit(self._cluster, self.run_dir, *self._arguments, overrides=())

    def stop(self) -> None:
        self._cluster.run("scancel", "--signal=TERM", self._job)

    def wait_for_end(self) -> None:
        _wait(lambda: int(self._cluster.field(self._job, "Restarts")) > 0, self.check)
        self._cluster.wait_for(self._job, "PENDING", timeout_s=DEADLINE_S)

    def go_on(self) -> float:
        began = time.monotonic()
        self._cluster.start_now(self._job)
        return time.monotonic() - began

    def check(self) -> None:
        state = self._cluster.state(self._job)
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            raise RuntimeError(f"{self.run_dir}: job {self._job} is {state}, see {self.run_dir}/slurm")

    def close(self) -> None:
        if self._job:
            self._cluster.run("scancel", "--signal=KILL", "--full", self._job, check=False)
            self._cluster.run("scancel", self._job, check=False)


Submitted = LocalRun | SlurmRun


@contextmanager
def closing(run: Submitted) -> Iterator[Submitted]:
    try:
        yield run
    finally:
        run.close()


def cycle(run: Submitted, *, steps: int) -> Cycle:
    """Submit; after so many steps stop it by signal; let it go on; stop it for good after one step more."""
    found = Cycle()
    with closing(run):
        submitted = time.time()
        run.submit()
        _wait(lambda: _has_line(run.run_dir / "logs/rank-0.log"), run.check)
        found.first_line = time.time() - submitted
        _wait(lambda: len(records(run.run_dir, 0)) >= steps, run.check)
        found.first_step = records(run.run_dir, 0)[0]["time"] - submitted
        signalled = time.time()
        run.stop()
        run.wait_for_end()
        found.ended = time.time() - signalled
        found.durable = newest_commit(run.run_dir) - signalled
        if found.durable < 0:
            raise RuntimeError(f"{run.run_dir}: no checkpoint since the signal")
        found.held = run.go_on()
        _wait(lambda: bool(records(run.run_dir, 1)) and "start_seconds" in attempt(run.run_dir, 1), run.check)
        found.next_step = records(run.run_dir, 1)[0]["time"] - signalled
        found.starts = [attempt(run.run_dir, number)["start_seconds"] for number in (0, 1)]
    return found


def _wait(until: Callable[[], bool], check: Callable[[], None], *, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not until():
        check()
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:.0f} s")
        time.sleep(_POLL_S)


def _has_line(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def records(run_dir: Path, number: int) -> list[dict[str, Any]]:
    """Of steps, that this start has written so far."""
    path = run_dir / f"metrics/{number:04d}.jsonl"
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text().split("\n")
    return [record for record in map(json.loads, filter(None, lines)) if "step" in record]


def attempt(run_dir: Path, number: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / f"attempts/{number:04d}.json").read_text())
    return record


def commits(run_dir: Path) -> list[tuple[int, float]]:
    """(step, Unix time of COMMIT) of each checkpoint that is kept."""
    paths = (run_dir / "checkpoints").glob("step-*/COMMIT")
    return sorted((int(path.parent.name.split("-")[1]), path.stat().st_mtime) for path in paths)


def newest_commit(run_dir: Path) -> float:
    return max((when for _step, when in commits(run_dir)), default=0.0)


# ------------------------------------------------------------------------------------------------------ what a save costs


@dataclass(frozen=True)
class Saves:
    """What saves cost a run that goes on training."""

    step_s: float
    """Median time of a step beside which nothing is written."""
    beside_s: float
    """By how much the steps after a save, beside which it is written, are longer together, in the median."""
    stall_s: float
    """Mean time that training stands still for one."""
    saves: int

    def share(self, every: int) -> float:
        """Of the time, with a save every so many steps."""
        return self.stall_s / (every * self.step_s)

    def share_with_slower_steps(self, every: int) -> float:
        return (self.stall_s + max(0.0, self.beside_s)) / (every * self.step_s)


def scraped(run_dir: Path) -> dict[str, float]:
    """Rank 0's metrics as they are now, by name with labels."""
    target = json.loads((run_dir / "metrics_targets.json").read_text())["targets"][0]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def step_seconds(found: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Seconds of each step but the first two of a start, where each has a record."""
    return {
        record["step"]: (record["images"] - before["images"]) / record["images_per_s"]
        for before, record in itertools.pairwise(found[1:])
        if record["step"] == before["step"] + 1 and record["phase"] == before["phase"]
    }


STEPS_BESIDE = 3
"""Steps after a save that it may be written beside."""


def saves_of(found: Sequence[dict[str, Any]], stall_s: float, every: int) -> Saves:
    """From the records of all steps of a run that saves every so many."""
    seconds = step_seconds(found)
    saves = range(every, max(seconds), every)
    after = [range(save + 1, save + 1 + STEPS_BESIDE) for save in saves]
    beside = {step for steps in after for step in steps}
    step_s = statistics.median(value for step, value in seconds.items() if step not in beside)
    longer = [sum(seconds[step] - step_s for step in steps) for steps in after if seconds.keys() >= set(steps)]
    return Saves(step_s, statistics.median(longer), stall_s, len(longer))


def measure_saves(run: LocalRun, *, every: int, steps: int) -> Saves:
    """Of a run that was given `checkpoint.every_steps` = `every` and a record a step."""
    with closing(run):
        run.submit()
        _wait(lambda: len(records(run.run_dir, 0)) >= every + STEPS_BESIDE, run.check)
        # the first save of a start makes its buffers
        first = scraped(run.run_dir)
        _wait(lambda: len(records(run.run_dir, 0)) >= steps, run.check)
        last = scraped(run.run_dir)
        found = records(run.run_dir, 0)
        run.stop()
        run.wait_for_end()
    name = metric_names.CHECKPOINT_SECONDS.name
    saves = last[f"{name}_count"] - first[f"{name}_count"]
    return saves_of(found, (last[f"{name}_sum"] - first[f"{name}_sum"]) / saves, every)
