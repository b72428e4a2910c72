"""A queue of jobs that run as processes on this machine, some at a time. What is done is skipped; what fails does not stop the
others. No torch."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from launch.environment import Place
from launch.job import signal_name
from launch.local import free_port
from launch.ranks import kill_rank, last_line, log_path, signal_rank, start_rank
from trainer.config import CODE_ROOT
from trainer.errors import UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.5
State = Literal["waiting", "running", "done", "failed", "blocked", "stopped"]


@dataclass(frozen=True)
class Stage:
    """One process."""

    name: str
    command: Sequence[str] | Callable[[], Sequence[str]]
    """Or what says it when the stage starts."""
    done: Callable[[], bool]
    """Whether what it makes is there."""
    estimated_s: float


@dataclass
class Job:
    """Stages, one after the other."""

    name: str
    stages: Sequence[Stage]
    work_dir: str
    """Its log is below."""
    after: Sequence[str] = ()
    cores: int = 1
    """That its processes use, and threads that they have."""
    state: State = "waiting"
    why: str = ""
    """Of a job that failed or could not run."""
    ran_s: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage that ran here."""

    @property
    def log(self) -> Path:
        return log_path(self.work_dir, 0)

    def next_stage(self) -> Stage | None:
        return next((stage for stage in self.stages if not stage.done()), None)


class Watcher(Protocol):
    """Told of what happens."""

    def changed(self, job: Job, what: str) -> None: ...
    def tick(self, queue: "Queue") -> None: ...


@dataclass
class _Running:
    job: Job
    stage: Stage
    process: subprocess.Popen[bytes]
    started: float


class Queue:
    def __init__(self, jobs: Sequence[Job], *, workers: int, watcher: Watcher, poll_s: float = POLL_S) -> None:
        """Jobs start in the order given, each when those it comes after are done and its cores are free.

        Args:
            workers: cores in all; a job that wants more gets these.
        """
        assert len({job.name for job in jobs}) == len(jobs)
        self.jobs, self._workers, self._watcher, self._poll_s = list(jobs), workers, watcher, poll_s
        self._by_name = {job.name: job for job in jobs}
        self._running: list[_Running] = []
        self._stop = False
        self._kill = False

    def run(self) -> bool:
        """Until nothing is left to do, or a signal asks to stop: trainers then save first. True: all are done."""
        for job in self.jobs:
            if job.state == "waiting" and job.next_stage() is None:
                job.state = "done"
        with self._signals():
            try:
                while not self._kill and (self._running or (not self._stop and self._start_next())):
                    while not self._stop and self._start_next():
                        pass
                    self._collect()
                    self._watcher.tick(self)
                    time.sleep(self._poll_s)
            finally:
                for running in self._running:
                    kill_rank(running.process)
                    running.process.wait()
                    running.job.state = "stopped"
                self._running = []
        return all(job.state == "done" for job in self.jobs)

    @property
    def stopped(self) -> bool:
        return self._stop

    def running(self) -> list[tuple[Job, Stage, float]]:
        """With seconds since the stage's start."""
        now = time.monotonic()
        return [(r.job, r.stage, now - r.started) for r in self._running]

    def left_s(self) -> float:
        """Seconds to the end, about: the estimates, scaled by how long the stages of that name took that have ended."""
        scales: dict[str, tuple[float, float]] = {}
        for job in self.jobs:
            for stage in job.stages:
                if stage.name in job.ran_s:
                    took, estimated = scales.get(stage.name, (0.0, 0.0))
                    scales[stage.name] = took + job.ran_s[stage.name], estimated + stage.estimated_s
        left = 0.0
        ran = {running.job.name: time.monotonic() - running.started for running in self._running}
        for job in self.jobs:
            if job.state not in ("waiting", "running"):
                continue
            passed = ran.get(job.name, 0.0)
            for stage in job.stages:
                if not stage.done():
                    took, estimated = scales.get(stage.name, (1.0, 1.0))
                    left += self._cores(job) * max(stage.estimated_s * took / estimated - passed, 0.0)
                    passed = 0.0
        return left / self._workers

    def _cores(self, job: Job) -> int:
        return min(job.cores, self._workers)

    # ------------------------------------------------------------------------------------------------------- processes

    def _start_next(self) -> bool:
        """Whether one was started. A job that waits for cores lets no later one pass: it would never get them."""
        free = self._workers - sum(self._cores(running.job) for running in self._running)
        for job in self.jobs:
            if job.state != "waiting":
                continue
            before = [self._by_name[name] for name in job.after]
            lost = [other for other in before if other.state in ("failed", "blocked")]
            if lost:
                job.state, job.why = "blocked", f"{lost[0].name} is not there: {lost[0].why}"
                self._watcher.changed(job, job.why)
            elif all(other.state == "done" for other in before):
                if self._cores(job) > free:
                    return False
                self._start(job)
                return True
        return False

    def _start(self, job: Job) -> None:
        stage = job.next_stage()
        if stage is None:
            job.state = "done"
            return
        place = Place(
            rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=free_port(),
            code_dir=str(CODE_ROOT), work_dir=job.work_dir, use_gpus=False, num_threads=self._cores(job), one_machine=True,
        )  # fmt: skip
        try:
            command = stage.command() if callable(stage.command) else stage.command
        except UserError as e:
            job.state, job.why = "failed", str(e)
            self._watcher.changed(job, job.why)
            return
        process = start_rank(command, place, attempt=stage.name)
        self._running.append(_Running(job, stage, process, time.monotonic()))
        job.state = "running"

    def _collect(self) -> None:
        for running in [r for r in self._running if r.process.poll() is not None]:
            self._running.remove(running)
            job, stage, code = running.job, running.stage, running.process.returncode
            kill_rank(running.process)  # what it may have left behind
            job.ran_s[stage.name] = took = time.monotonic() - running.started
            if self._stop and not stage.done():
                job.state = "stopped"
            elif code != 0 or not stage.done():
                job.state = "failed"
                job.why = f"{stage.name} ended with {signal_name(code)}: {last_line(job.log)}"
                self._watcher.changed(job, f"{job.why} (log: {job.log})")
            else:
                self._watcher.changed(job, f"{stage.name} in {took:.0f} s")
                job.state = "done" if job.next_stage() is None else "waiting"
                if job.state == "waiting" and not self._stop:
                    self._start(job)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            self._kill = True
            return
        self._stop = True
        for running in self._running:
            signal_rank(running.process, signal.SIGTERM)
