"""A job's processes: starting one, and what to do once they have ended. Shared by all clusters. No torch."""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launch.cancellation import CANCELLED, asked_to_cancel
from launch.environment import Place, rank_environment
from launch.job import signal_name, update_job
from launch.reached import reached
from trainer.errors import ExitCode
from trainer.restarts import (
    BAD_NODE,
    MAX_WITHOUT_CHECKPOINT,
    NO_STEP_EXPECTED,
    WARNED,
    used_of_budget,
    without_checkpoint,
)
from trainer.run_folder import JOB, RunFolder

CRASH_GRACE_S = 10.0
"""One rank has crashed: the others may follow by themselves for so long, since one of them may know the true reason."""
KILL_S = 30.0
"""Longest wait for processes that have been killed: one that a hung disk or driver holds dies when that lets go, or never."""
HANGS = (ExitCode.HANG, -signal.SIGALRM, 128 + signal.SIGALRM)
"""How a rank ends that its watchdog has ended; by SIGALRM where its interpreter was stuck too."""
_HEAD = re.compile(r"==== \d{4}-\d\d-\d\d ")
"""Of a start's part of a rank's log."""
_WARNING = re.compile(r"\bwarnings\.warn\(|\b[A-Za-z]*Warning: ")
"""A line that is no reason for an end; Python writes two of each."""
_OF_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "killed, most often for want of memory; see --mem, and dmesg on its node",
    signal.SIGSEGV: "a fault in native code; the log may have its stack",
    signal.SIGBUS: "memory that could not be read or written, most often a full /dev/shm or disk",
    signal.SIGTERM: "ended by somebody else's SIGTERM before it could save",
}
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


def kill_ranks(processes: Mapping[int, subprocess.Popen[bytes]], *, within_s: float = KILL_S) -> tuple[int, ...]:
    """SIGKILL them and their data workers; the ranks that do not die of it within the time, which are left behind."""
    for process in processes.values():
        kill_rank(process)
    deadline, stuck = time.monotonic() + within_s, []
    for rank, process in processes.items():
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stuck.append(rank)
    return tuple(stuck)


def signal_rank(process: subprocess.Popen[bytes], number: int) -> None:
    """The rank's own process only: its data workers must live until it has saved."""
    if process.poll() is None:
        process.send_signal(number)


@dataclass(frozen=True)
class Ends:
    """How the ranks of one launcher ended."""

    codes: dict[int, int]
    """Of the ranks that ended by themselves, in the order in which they were seen to; negative for a signal."""
    times: dict[int, float]
    """Unix times of these ends."""
    stuck: tuple[int, ...] = ()
    """Ranks that do not die of SIGKILL: a disk or a driver holds them."""

    @property
    def first(self) -> int:
        """The first that ended otherwise than well, else the first; 0 where none has."""
        return next((rank for rank, code in self.codes.items() if not _is_well(code)), next(iter(self.codes), 0))


def wait_for_ranks(
    processes: Mapping[int, subprocess.Popen[bytes]], *, give_up: Callable[[], bool], crash_grace_s: float = CRASH_GRACE_S,
    poll_s: float = 0.2,
) -> Ends:  # fmt: skip
    """Until all ranks have ended; those that linger are killed, and data workers that a crash has left.

    Ranks linger when one of them has ended otherwise than well, since they wait for it: they have `crash_grace_s` from then.

    Args:
        processes: by rank.
        give_up: called between two looks; True: wait no longer.
    """
    ends = Ends({}, {})
    deadline: float | None = None
    while True:
        for rank, process in processes.items():
            if rank not in ends.codes and process.poll() is not None:
                ends.codes[rank], ends.times[rank] = process.returncode, time.time()
                if deadline is None and not _is_well(process.returncode):
                    deadline = time.monotonic() + crash_grace_s
        if len(ends.codes) == len(processes) or (deadline is not None and time.monotonic() > deadline) or give_up():
            break
        time.sleep(poll_s)
    return replace(ends, stuck=kill_ranks(processes))


def _is_well(code: int) -> bool:
    return code in (ExitCode.DONE, ExitCode.REQUEUE)


def last_line(path: Path, *, max_bytes: int = 16_384) -> str:
    """The last line of a log that is not empty: of a Python process that failed, the error."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "no log"
    told = (line.strip() for line in reversed(lines) if line.strip() and not _WARNING.search(line))
    last = next(told, "nothing in the log")
    return "nothing said since its start" if _HEAD.match(last) else last


def cause_of(code: int, log: Path) -> str:
    """Why a rank has ended with `code`, as far as can be told. Of what a signal ended the log's last line is not the reason."""
    number = -code if code < 0 else code - 128
    return _OF_SIGNALS[signal.Signals(number)] if number in _OF_SIGNALS else last_line(log)


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
    bad = {rank: code for rank, code in codes.items() if not _is_well(code)}
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


def decide(
    folder: RunFolder, outcome: Outcome, *, preempted: bool, max_restarts: int, log: Path, asked_by: str | None = None
) -> Decision:  # fmt: skip
    """Start again or not; the restart, or the end, is recorded in `job.json`.

    Crashes have a budget, which fills up again as the run gets on. Restarts in a row that bring no newer checkpoint end the
    run, whatever its budget: except for preemptions, which a busy cluster may well repeat before the first step.

    Args:
        asked_by: name of the signal that asked it to stop, where that is known.
    """
    name = f"rank {outcome.rank} ended with {signal_name(outcome.code)}"
    if outcome.kind == "done":
        return _end(folder, 0, "done")
    if outcome.kind == "stop":
        return _end(folder, int(ExitCode.STOP), f"{last_line(log)} (rank {outcome.rank}; log: {log})")
    if asked_to_cancel(folder):
        saved = reached(folder).checkpoint
        newest = f"step {saved}" if saved >= 0 else "none"
        why = (
            f"saved at {newest}"
            if outcome.kind == "requeue" and saved >= 0
            else f"not saved, newest checkpoint: {newest}"
        )
        return _end(folder, CANCELLED, f"cancelled, {why}" + ("" if outcome.kind == "requeue" else f"; {name}"))
    history: list[dict[str, Any]] = folder.read_json(JOB)["restarts"] if folder.exists(JOB) else []
    now = reached(folder, history)
    reason: str = (
        outcome.kind if outcome.kind in ("crash", "lost") else "preempted" if preempted else "asked by the trainer"
    )
    if outcome.kind == "crash" and outcome.code in HANGS:
        reason = "hang"
    if outcome.kind == "crash" and outcome.code == ExitCode.BAD_NODE:
        reason = BAD_NODE
    warned = reason == "preempted" and asked_by == "SIGUSR2"
    if outcome.kind == "crash":
        stuck = outcome.code in HANGS and outcome.code != ExitCode.HANG
        in_native = "no step, and native code held the interpreter; its stacks are in the log"
        said = in_native if stuck else cause_of(outcome.code, log)
        name += f": {said} (log: {log})"
        if used_of_budget(history, now.train_seconds) >= max_restarts:
            return _end(folder, outcome.code if outcome.code > 0 else 128 - outcome.code,
                        f"{name}; not started again, the budget of {max_restarts} restarts is spent")  # fmt: skip
    if reason not in NO_STEP_EXPECTED and without_checkpoint(history, now.checkpoint) >= MAX_WITHOUT_CHECKPOINT:
        got = "to its first checkpoint" if now.checkpoint < 0 else f"past the checkpoint of step {now.checkpoint}"
        return _end(folder, int(ExitCode.STOP), f"{name}; not started again, {MAX_WITHOUT_CHECKPOINT} restarts have "
                    f"not brought it {got}")  # fmt: skip
    entry = {"reason": reason, "code": outcome.code, "rank": outcome.rank, **now.as_record(), "time": time.time()}
    entry |= {"signal": asked_by} if warned else {}
    update_job(folder, restarts=[*history, entry])
    how = WARNED if warned else reason
    why = {"crash": name, "lost": f"rank {outcome.rank} was lost"}.get(outcome.kind, f"stopped after saving ({how})")
    return Decision(True, int(ExitCode.REQUEUE), why)


def _end(folder: RunFolder, code: int, why: str) -> Decision:
    end_job(folder, code, why)
    return Decision(False, code, why)


def end_job(folder: RunFolder, code: int, why: str) -> None:
    update_job(folder, ended={"code": code, "why": why, "time": time.time()})
