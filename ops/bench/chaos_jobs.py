"""What chaos strikes: the demo cut small, as a job under a launcher, seen and handled from outside as a scheduler does.

No torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from launch.ranks import die_with_parent
from launch.runs.read import earlier_jobs, ended, restarts_of
from trainer.run_folder import JOB, RunFolder

STOPPED, LOST, DONE = "stopped after saving", "launcher lost", "done"
"""Ends of a launcher, beside the reasons of the restarts that it makes by itself."""
POLL_S = 0.02
LOOK_S = 1.0
END_S = 300.0
"""Longest that anything may take which is waited for: a start on loaded cores, a hang with its limit, a save."""

T = TypeVar("T")


class Broken(RuntimeError):
    """The run did what no fault explains."""


def settings(steps: int, interval: int, seed: int, watchdog_s: float) -> list[str]:
    """The demo with a model of 0.1M parameters: its data, codec, three phases with LPL in the last; `steps` in all."""
    first, second = steps * 2 // 5, steps * 2 // 5
    return [
        "task.model={kind: mmdit, num_blocks: 2, num_heads: 2, head_dim: 16, patch_size: 1, position_grid: 16, base_grid: 8}",
        "task.text={kind: bytes, max_bytes: 24, width: 32, num_blocks: 1, num_heads: 2}",
        f"phases.low_resolution.steps={first}",
        f"phases.full_resolution.steps={second}",
        f"phases.perceptual.steps={steps - first - second}",
        *(f"phases.{name}.batch_size=8" for name in ("low_resolution", "full_resolution", "perceptual")),
        f"seed={seed}",
        "parallel.num_threads=1",
        # with data workers the watchdog waits for data.timeout_s and half as long again
        "data.num_workers=0",
        "metrics.every_steps=1",
        f"checkpoint.every_steps={interval}",
        f"watchdog={{factor: 10, min_s: {watchdog_s}, first_step_s: 60, between_steps_s: 30}}",
        "samples=null",
        "prompt_accuracy=null",
        "optim.warmup_steps=4",
        "ema.start_step=3",
    ]  # fmt: skip


def wait_for(
    what: str,
    ready: Callable[[], T | None],
    *,
    timeout_s: float = END_S,
    poll_s: float = POLL_S,
    still: Callable[[], None],
) -> T:
    """What `ready` returns once it is not None. `still` raises where waiting has become useless.

    Raises:
        Broken: it does not come.
    """
    end, look = time.monotonic() + timeout_s, 0.0
    while (found := ready()) is None:
        now = time.monotonic()
        if now >= look:
            # not at each turn: it may ask a scheduler
            still()
            look = now + LOOK_S
        if now > end:
            raise Broken(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(poll_s)
    return found


def ranks_of(run_dir: str) -> dict[int, int]:
    """The pids of the trainers of a run on this machine, by rank."""
    found: dict[int, tuple[int, int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
            # only of those that are ours: another user's environment cannot be read
            if "trainer.train" not in words or run_dir not in words:
                continue
            environment = Path(entry.path, "environ").read_bytes().decode(errors="replace").split("\0")
            parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        rank = next((int(text.removeprefix("RANK=")) for text in environment if text.startswith("RANK=")), None)
        if rank is not None:
            found[int(entry.name)] = (rank, parent)
    return {rank: pid for pid, (rank, parent) in found.items() if parent not in found}


def events_of(job: dict[str, Any] | None) -> list[str]:
    """What `job.json` says of a run: each restart by its reason, and how each launcher that had it ended, oldest first; for
    one that said nothing, that it was lost."""
    if job is None:
        return []
    jobs = [*earlier_jobs(job), job]
    found = []
    for one in jobs:
        found += [str(entry.get("reason")) for entry in restarts_of(one)]
        end = ended(one)
        if end is not None:
            found.append({0: DONE, 75: STOPPED}.get(int(end["code"]), f"ended with {end['code']}"))
        elif one is not job:
            found.append(LOST)
    return found


class Job(Protocol):
    """A run of the demo that can be struck. Ranks have been started by somebody who starts them again."""

    folder: RunFolder
    launcher_dies: bool
    """Whether a launcher is at hand that can be killed."""
    again_by_itself: bool
    """A job that was told to stop starts again by itself."""

    def begin(self, ranks: int) -> None:
        """Submit it; again, where it had been told to stop or its launcher was killed."""

    def tell(self, number: int) -> None:
        """The scheduler's signal to the whole job."""

    def kill_launcher(self) -> None: ...

    def wait_stopped(self) -> None:
        """After `tell`: until it has saved and ended."""

    def go_on(self) -> None:
        """After a restart that SLURM holds back."""

    def check(self) -> None:
        """Raises Broken where the job has ended though nobody told it to."""

    def code(self) -> int | None:
        """The exit code of the job; None while it lives."""

    def end(self) -> None:
        """Whatever still runs."""


class LocalJob:
    """Under the local supervisor, submitted by our own command from a copy of the code: edits of the checkout meanwhile
    change nothing."""

    launcher_dies, again_by_itself = True, False

    def __init__(self, run_dir: Path, code: Path, overrides: Sequence[str], *, max_restarts: int) -> None:
        self.folder = RunFolder(str(run_dir))
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        self._command = [
            sys.executable, str(code / "launch/slurm.py"), "demo", "--cluster", "local", "--cpu", "--run-dir", str(run_dir),
            "--max-restarts", str(max_restarts), *(word for text in overrides for word in ("--set", text)),
        ]  # fmt: skip
        self._launcher: subprocess.Popen[bytes] | None = None

    def begin(self, ranks: int) -> None:
        with open(self._log, "ab") as log:
            self._launcher = subprocess.Popen(
                [*self._command, "--gpus-per-node", str(ranks)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd=self._log.parent, preexec_fn=die_with_parent(os.getpid()),
            )  # fmt: skip

    @property
    def launcher(self) -> "subprocess.Popen[bytes]":
        assert self._launcher is not None
        return self._launcher

    def tell(self, number: int) -> None:
        self.launcher.send_signal(number)

    def kill_launcher(self) -> None:
        self.launcher.kill()
        self.launcher.wait()

        def gone() -> bool | None:
            return True if not ranks_of(self.folder.url) else None

        wait_for("the ranks' end after their launcher's", gone, timeout_s=60, still=lambda: None)

    def wait_stopped(self) -> None:
        try:
            code = self.launcher.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            raise Broken(f"told to stop, the launcher has not ended within {END_S:.0f} s; see {self._log}") from None
        if code != 75:
            raise Broken(f"told to stop, the launcher ended with {code}, not 75; see {self._log}")

    def go_on(self) -> None:
        pass

    def check(self) -> None:
        code = self.launcher.poll()
        if code is not None:
            raise Broken(f"the launcher ended with {code}; see {self._log}")

    def code(self) -> int | None:
        return self.launcher.poll()

    def end(self) -> None:
        if self._launcher and self._launcher.poll() is None:
            self._launcher.kill()
            self._launcher.wait()


@contextmanager
def ending(job: Job) -> Iterator[Job]:
    try:
        yield job
    finally:
        job.end()


def job_record(folder: RunFolder) -> dict[str, Any] | None:
    return folder.read_json(JOB) if folder.exists(JOB) else None


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Broken(f"process {pid} had ended before it was struck") from None
