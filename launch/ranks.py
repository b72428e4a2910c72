"""A job's processes: starting one, and what to do once they have ended. Shared by all clusters. No torch."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cancellation import CANCELLED, asked_to_cancel
from launch.environment import Place, rank_environment
from launch.job import signal_name, update_job
from trainer.errors import ExitCode
from trainer.run_folder import JOB, RunFolder

CRASH_GRACE_S = 10.0
"""One rank has crashed: the others may follow by themselves for so long, since one of them may know the true reason."""
MAX_RESTARTS_WITHOUT_STEP = 3
"""Restarts in a row without a newer step; more of them would only burn the allocation."""
BAD_NODE = "bad node"
"""Reason of a restart for a machine that failed the check before the ranks start; the next start goes without it."""
CRASHES = ("crash", "hang", BAD_NODE)
"""Reasons of restarts that count against the budget."""
NO_STEP_EXPECTED = ("preempted", BAD_NODE)
"""Reasons that say nothing of whether the run itself gets on: a busy cluster preempts before the first step."""
HANGS = (ExitCode.HANG, -signal.SIGALRM, 128 + signal.SIGALRM)
"""How a rank ends that its watchdog has ended; by SIGALRM where its interpreter was stuck too."""
_PR_SET_PDEATHSIG = 1


def log_path(work_dir: str, rank: int) -> Path:
    return Path(work_dir, "logs", f"rank-{rank}.log")


def start_rank(command: Sequence[str], place: Place, *, attempt: str) -> subprocess.Popen[bytes]:
    """Start a rank in a session of its own, which dies with this process; its output goes to its log.

    A session of its own: a Ctrl-C in the terminal is for the launcher, which passes it on as a request to save.
    """
    path = log_path(place.work_dir, place.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with open(path, "ab") as log:
        log.write(f"==== {started} {attempt}, rank {place.rank} of {place.world_size}\n".encode())
        log.flush()
        return subprocess.Popen(
            command, env=rank_environment(place), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent(os.getpid()),
        )  # fmt: skip


def die_with_parent(parent: int) -> Callable[[], None]:
    """SIGKILL, not SIGTERM: a rank that went on saving could meet the next start of its own run in the run folder."""
    libc = ctypes.CDLL(None)  # loaded here: the child between fork and exec should allocate as little as possible

    def set_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return set_signal


def kill_rank(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the rank and its data workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def signal_rank(process: subprocess.Popen[bytes], number: int) -> None:
    """The rank's own process only: its data workers must live until it has saved."""
    if process.poll() is None:
        process.send_signal(number)


def last_line(path: Path, *, max_bytes: int = 16_384) -> str:
    """The last line of a log that is not empty: of a Python process that failed, the error."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in the log")


# ------------------------------------------------------------------------------------------- what the exit codes say


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, over all ranks."""

    kind: Literal["done", "requeue", "stop", "crash", "lost"]
    """`lost`: its machine took it along, without a word."""
    code: int
    rank: int
    """The rank whose code it is; for a crash, of the first that ended."""


def outcome_of(codes: Mapping[int, int], *, first: int, world_size: int, stop_requested: bool) -> Outcome:
    """One outcome from the exit codes of the ranks.

    Args:
        codes: exit code by rank, negative for a signal, of the ranks that ended by themselves.
        first: the rank among them that ended first.
        world_size: ranks that there were; one without a code had to be killed.
        stop_requested: the launcher has asked the ranks to save and stop.
    """
    for rank, code in codes.items():
        if code in (ExitCode.STOP, ExitCode.USAGE):  # one that knows why beats those that only lost their peer
            return Outcome("stop", code, rank)
    for rank, code in codes.items():
        if code == ExitCode.BAD_NODE:  # before all others: they are told to stop when this one's task ends
            return Outcome("crash", code, rank)
    if stop_requested:
        for rank, code in codes.items():
            if code in (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGUSR2, 128 + signal.SIGUSR2):
                # Asked before the trainer could listen: nothing to save yet, and its peers fail for want of it.
                return Outcome("requeue", int(ExitCode.REQUEUE), rank)
    bad = {rank: code for rank, code in codes.items() if code not in (ExitCode.DONE, ExitCode.REQUEUE)}
    if bad:
        rank = first if first in bad else next(iter(bad))
        return Outcome("crash", bad[rank], rank)
    for rank, code in codes.items():
        if code == ExitCode.REQUEUE:
            return Outcome("requeue", code, rank)
    if len(codes) < world_size:
        return Outcome("crash", 1, next(rank for rank in range(world_size) if rank not in codes))
    return Outcome("done", 0, first)


@dataclass(frozen=True)
class Decision:
    restart: bool
    code: int
    """Of the job, when it is not started again."""
    why: str


def decide(folder: RunFolder, outcome: Outcome, *, preempted: bool, max_restarts: int, log: Path) -> Decision:
    """Start again or not; the restart, or the end, is recorded in `job.json`.

    Crashes have a budget. Restarts in a row that bring no newer step end the run, whatever its budget: except for
    preemptions, which a busy cluster may well repeat before the first step.
    """
    name = f"rank {outcome.rank} ended with {signal_name(outcome.code)}"
    if outcome.kind == "done":
        return _end(folder, 0, "done")
    if outcome.kind == "stop":
        return _end(folder, int(ExitCode.STOP), f"{last_line(log)} (rank {outcome.rank}; log: {log})")
    if asked_to_cancel(folder):
        how = "after saving" if outcome.kind == "requeue" else f"not saved: {name}"
        return _end(folder, CANCELLED, f"cancelled ({how}); `loupe runs resume` goes on from the newest checkpoint")
    history: list[dict[str, Any]] = folder.read_json(JOB)["restarts"] if folder.exists(JOB) else []
    step = newest_step(folder)
    reason: str = (
        outcome.kind if outcome.kind in ("crash", "lost") else "preempted" if preempted else "asked by the trainer"
    )
    if outcome.kind == "crash" and outcome.code in HANGS:
        reason = "hang"
    if outcome.kind == "crash" and outcome.code == ExitCode.BAD_NODE:
        reason = BAD_NODE
    if outcome.kind == "crash":
        stuck = outcome.code in HANGS and outcome.code != ExitCode.HANG
        said = "no step, and native code held the interpreter; its stacks are in the log" if stuck else last_line(log)
        name += f": {said} (log: {log})"
        crashes = sum(entry["reason"] in CRASHES for entry in history)
        if crashes >= max_restarts:
            return _end(folder, outcome.code if outcome.code > 0 else 128 - outcome.code,
                        f"{name}; not started again, the budget of {max_restarts} restarts is spent")  # fmt: skip
    unmoved = 0
    for entry in reversed(history):
        if entry["step"] != step:
            break
        unmoved += entry["reason"] not in NO_STEP_EXPECTED
    if reason not in NO_STEP_EXPECTED and unmoved >= MAX_RESTARTS_WITHOUT_STEP:
        return _end(folder, int(ExitCode.STOP), f"{name}; not started again, {MAX_RESTARTS_WITHOUT_STEP} restarts have "
                    f"not brought it past step {step}")  # fmt: skip
    entry = {"reason": reason, "code": outcome.code, "rank": outcome.rank, "step": step, "time": time.time()}
    update_job(folder, restarts=[*history, entry])
    why = {"crash": name, "lost": f"rank {outcome.rank} was lost"}.get(outcome.kind, f"stopped after saving ({reason})")
    return Decision(True, int(ExitCode.REQUEUE), why)


def _end(folder: RunFolder, code: int, why: str) -> Decision:
    end_job(folder, code, why)
    return Decision(False, code, why)


def end_job(folder: RunFolder, code: int, why: str) -> None:
    update_job(folder, ended={"code": code, "why": why, "time": time.time()})


def newest_step(folder: RunFolder) -> int:
    """Newest step in the run's metrics, over all attempts; -1 before the first."""
    records = folder.metrics()
    return int(records[-1]["step"]) if records else -1
