"""The faults of chaos: what is done to a run, and what may come of it. No torch."""

import json
import math
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.console import MetricsTail, Record
from ops.bench.chaos_jobs import LOST, STOPPED, Broken, Job, events_of, job_record, kill, ranks_of, wait_for
from trainer.checkpoint.folder import COMMIT, INDEX, CheckpointFolder, Entry
from trainer.checkpoint.records import ITEM_BYTES
from trainer.run_folder import CHECKPOINTS, RunFolder

PREEMPTION, TIME_LIMIT, RANK, RANK_0 = "preemption", "time limit", "rank killed", "rank 0 killed"
LAUNCHER, HANG, SAVE = "launcher killed", "rank stopped", "killed in a save"
FLIP, TRUNCATION, DELETION, RESIZE = "bit flip", "truncation", "deletion", "resize"
KINDS = (PREEMPTION, TIME_LIMIT, RANK, RANK_0, LAUNCHER, HANG, SAVE, FLIP, TRUNCATION, DELETION)
DAMAGE = (FLIP, TRUNCATION, DELETION)
TOLD = {PREEMPTION: signal.SIGTERM, TIME_LIMIT: signal.SIGUSR2, RESIZE: signal.SIGTERM}
"""The job is told beforehand, and saves."""
STEPS_BEFORE_HANG = 6
"""In a start, until the watchdog knows how long a step takes."""


@dataclass
class Struck:
    """A fault, and how the run came back."""

    kind: str
    ranks: int
    """Of the start that it struck."""
    detail: str
    step: int
    """The newest when it struck."""
    reached: int
    """The newest of the start that it struck, which may have gone on for a little."""
    resumed: int
    """After which step the next start went on."""
    newest_whole: int
    """Step of the newest checkpoint that was whole and committed when the start had ended; 0 where none was."""
    allowed: int
    """Steps that it may lose."""
    event: str
    """What `job.json` should say of it."""
    noticed_s: float
    """Until the launcher had ended the start and recorded it; of a fault that ended the launcher, until all had ended."""
    new_step_s: float
    """Until the first step that the run had not done before."""

    @property
    def lost(self) -> int:
        return self.reached - self.resumed


class Steps:
    """The steps of each start, as rank 0 records them."""

    def __init__(self, folder: RunFolder) -> None:
        self._tail = MetricsTail(folder)
        self.by_start: dict[int, list[Record]] = {}

    def poll(self) -> None:
        for file in self._tail.poll():
            start = int(Path(file.name).stem)
            self.by_start.setdefault(start, []).extend(file.records)

    @property
    def newest_start(self) -> int:
        return max((start for start, records in self.by_start.items() if records), default=-1)

    def of(self, start: int) -> list[Record]:
        return self.by_start.get(start, [])

    def newest(self, start: int) -> int:
        records = self.of(start)
        return int(records[-1]["step"]) if records else 0


def wait_done(job: Job) -> int:
    """The exit code of a job that nobody strikes any more.

    Raises:
        Broken: neither a step nor the end has come for a long time.
    """
    steps, done = Steps(job.folder), -1
    while True:
        before = done

        def moved(before: int = before) -> int | None:
            steps.poll()
            done = sum(map(len, steps.by_start.values()))
            return done if done > before or job.code() is not None else None

        done = wait_for("a step, or the end", moved, poll_s=0.5, still=lambda: None)
        if (code := job.code()) is not None:
            return code


class Striker:
    """Strikes one job, fault after fault, and waits after each until the run has done a step that it had not done before."""

    def __init__(self, job: Job, rng: random.Random, *, ranks: int, interval: int) -> None:
        self.job, self.ranks = job, ranks
        self.steps = Steps(job.folder)
        self._rng, self._interval = rng, interval
        self._checkpoints = CheckpointFolder(f"{job.folder.url}/{CHECKPOINTS}")

    def strike(self, kind: str, *, after: int) -> Struck:
        """One fault, `after` steps that the run had not done before.

        Raises:
            Broken: the run does not come back, or does what the fault does not explain.
        """
        start, before = self.steps.newest_start, self._events()
        at = max(self._reached(), 0) + after
        least = STEPS_BEFORE_HANG if kind == HANG else 1
        self._wait_for_step(at, least)
        start = self.steps.newest_start
        if kind == SAVE:
            self._wait_for_save(start)
        step, ranks, damaged = self.steps.newest(start), self.ranks, None
        if kind in DAMAGE:
            damaged, detail = damage(self._checkpoints, kind, self._rng)
        struck = time.time()
        if kind in TOLD:
            self.job.tell(TOLD[kind])
            detail = signal.Signals(TOLD[kind]).name
            self.job.wait_stopped()
        elif kind == LAUNCHER:
            self.job.kill_launcher()
            detail = "SIGKILL"
        else:
            victim = 0 if kind == RANK_0 else self._victim(kind)
            kill(self._pid(victim), signal.SIGSTOP if kind == HANG else signal.SIGKILL)
            detail = f"rank {victim}" if kind not in DAMAGE else f"{detail}, rank {victim} killed"
        noticed = time.time()
        expected = self._expected(kind)
        if expected not in (STOPPED, LOST):
            noticed = wait_for("a restart in job.json", lambda: self._restarted_at(before), still=self.job.check)
        self.steps.poll()
        reached = self.steps.newest(start)
        newest_whole, allowed = self._what_there_is(kind, start, reached, damaged)
        if expected in (STOPPED, LOST):
            if kind == RESIZE:
                self.ranks = 1 if self.ranks == 2 else 2
            self.job.begin(self.ranks)
        else:
            self.job.go_on()
        resumed, new_step = wait_for(
            f"a step after {reached}", lambda: self._first_new_step(start, reached), still=self.job.check
        )
        return Struck(
            kind,
            ranks,
            detail,
            step,
            reached,
            resumed,
            newest_whole,
            allowed,
            expected,
            noticed - struck,
            new_step - struck,
        )

    # --------------------------------------------------------------------------------------------------- looking, waiting

    def _reached(self) -> int:
        self.steps.poll()
        return self.steps.newest(self.steps.newest_start)

    def _wait_for_step(self, step: int, least: int) -> None:
        """`least`: so many steps of the newest start."""

        def there() -> bool | None:
            reached = self._reached()
            return True if reached >= step and len(self.steps.of(self.steps.newest_start)) >= least else None

        wait_for(f"step {step}", there, still=self.job.check)

    def _wait_for_save(self, start: int) -> None:
        """Until a file of a new checkpoint is there."""
        seen = {entry.name for entry in self._checkpoints.entries()}

        def begun() -> bool | None:
            root = self._checkpoints.root
            new = set(os.listdir(root)) - seen
            return True if any(os.listdir(f"{root}/{name}") for name in new) else None

        wait_for("a save", begun, poll_s=0.001, still=self.job.check)
        self.steps.poll()

    def _events(self) -> list[str]:
        return events_of(job_record(self.job.folder))

    def _restarted_at(self, before: list[str]) -> float | None:
        job = job_record(self.job.folder)
        return float(job["restarts"][-1]["time"]) if job and len(events_of(job)) > len(before) else None

    def _first_new_step(self, start: int, reached: int) -> tuple[int, float] | None:
        """(after which step the next start went on, Unix time of the first step beyond `reached`)."""
        self.steps.poll()
        for later in sorted(self.steps.by_start):
            if later > start:
                for record in self.steps.of(later):
                    if record["step"] > reached:
                        return int(self.steps.of(start + 1)[0]["step"]) - 1, float(record["time"])
        return None

    # ------------------------------------------------------------------------------------------------------------ striking

    def _victim(self, kind: str) -> int:
        return 1 if kind == RANK and self.ranks > 1 else self._rng.randrange(self.ranks)

    def _pid(self, rank: int) -> int:
        pids = ranks_of(self.job.folder.url)
        if sorted(pids) != list(range(self.ranks)):
            raise Broken(f"{self.job.folder.url}: ranks {sorted(pids)} run, not {self.ranks}")
        return pids[rank]

    def _expected(self, kind: str) -> str:
        if kind in TOLD:
            return "preempted" if self.job.again_by_itself else STOPPED
        return {LAUNCHER: LOST, HANG: "hang"}.get(kind, "crash")

    def _what_there_is(self, kind: str, start: int, reached: int, damaged: str | None) -> tuple[int, int]:
        """(step of the newest whole checkpoint, steps that may be lost), when a start has ended.

        Saves are written in the background: one that was under way costs, beside the interval before it, the steps that were
        done since it began.
        """
        entries = self._checkpoints.entries()
        whole = [entry for entry in entries if entry.committed and entry.name != damaged]
        newest = whole[-1].step if whole else 0
        if kind in TOLD:
            return newest, 0
        began = float(self.job.folder.read_json(f"attempts/{start:04d}.json")["time"])
        cut = [
            entry.step
            for entry in entries
            if COMMIT not in entry.sizes and entry.name != damaged and entry.step > newest
            and os.stat(self._checkpoints.path(entry.name)).st_mtime >= began
        ]  # fmt: skip
        meanwhile = reached - min(cut) if cut else 0
        return newest, self._interval * (2 if kind in DAMAGE else 1) + meanwhile


def damage(checkpoints: CheckpointFolder, kind: str, rng: random.Random) -> tuple[str, str]:
    """Spoil one object of the newest checkpoint, at random: (the checkpoint's name, what was done)."""
    committed = [entry for entry in checkpoints.entries() if entry.committed]
    if not committed:
        raise Broken(f"{checkpoints.url}: no checkpoint to damage")
    entry = committed[-1]
    name = rng.choice(sorted(name for name, size in entry.sizes.items() if size))
    path = Path(checkpoints.path(f"{entry.name}/{name}"))
    what: Callable[[Path, Entry, str, CheckpointFolder, random.Random], str] = {
        FLIP: _flip, TRUNCATION: _truncate, DELETION: _delete
    }[kind]  # fmt: skip
    return entry.name, f"step {entry.step}: {name} {what(path, entry, name, checkpoints, rng)}"


def _flip(path: Path, entry: Entry, name: str, checkpoints: CheckpointFolder, rng: random.Random) -> str:
    at, bit = rng.randrange(entry.sizes[name]), rng.randrange(8)
    if name.endswith(".safetensors"):
        # the file's own header is for other readers; what ours takes is where the index says
        index = json.loads(Path(checkpoints.path(f"{entry.name}/{INDEX}")).read_text())
        places = [
            (chunk["begin"], math.prod(chunk["sizes"]) * ITEM_BYTES[tensor["dtype"]])
            for tensor in index["tensors"].values()
            for chunk in tensor["chunks"]
            if chunk["file"] == name and math.prod(chunk["sizes"])
        ]
        begin, size = rng.choice(places)
        at = begin + rng.randrange(size)
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = struct.unpack("B", file.read(1))
        file.seek(at)
        file.write(struct.pack("B", byte ^ (1 << bit)))
    return f"byte {at}"


def _truncate(path: Path, entry: Entry, name: str, checkpoints: CheckpointFolder, rng: random.Random) -> str:
    size = rng.randrange(entry.sizes[name])
    os.truncate(path, size)
    return f"cut to {size} of {entry.sizes[name]} bytes"


def _delete(path: Path, entry: Entry, name: str, checkpoints: CheckpointFolder, rng: random.Random) -> str:
    path.unlink()
    return "removed"
