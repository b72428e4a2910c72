"""The end of a start that cannot be recorded: storage hangs or refuses, or what lies there is damaged. No torch.

What to do next is then decided by the ranks' reports, which lie on the nodes' common disk, and noted there; the next start or
end that reaches the run folder puts it into `job.json`.
"""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data.deadlines import call_within
from launch.cancellation import CANCEL, CANCELLED, asked_to_cancel
from launch.job import signal_name, update_job
from launch.ranks import HANGS, Decision, Outcome, decide, last_line
from trainer.errors import ExitCode, UserError, one_line, storage_errors
from trainer.restarts import MAX_WITHOUT_CHECKPOINT
from trainer.run_folder import JOB, RunFolder

T = TypeVar("T")

ANSWER_S = 120.0
"""Longest that a start's beginning or end waits for the run folder."""
CANCEL_S = 20.0
"""Longest wait for the word of `loupe runs cancel`, after the run folder has failed once."""
UNRECORDED = "unrecorded.json"
"""File beside the ranks' reports of a start: a restart that `job.json` does not know of."""
RECORDED = "recorded.json"


def within_limit(function: Callable[[], T], what: str) -> T:
    """
    Raises:
        TimeoutError: storage has not answered in time.
    """
    try:
        return call_within(function, time.monotonic() + ANSWER_S, what)
    except TimeoutError as e:
        raise TimeoutError(f"{what}: {one_line(e)}") from e


def decide_unrecorded(
    folder: RunFolder, reports: Path, outcome: Outcome, *, preempted: bool, max_restarts: int, log: Path, error: Exception
) -> Decision:  # fmt: skip
    """As `decide`, which gave `error`. A few such ends in a row end the job: nothing reached the run folder in
    between, and so there is no newer checkpoint.

    Args:
        reports: folder of this start's reports, JOB.RESTART.
        log: of the outcome's rank.
    """
    named = f"{type(error).__name__}: {one_line(error)}"
    silent = (
        f"the run folder does not answer ({named})"
        if isinstance(error, storage_errors())
        else f"this end cannot be put into {folder.url}/{JOB} ({named})"
    )
    name = f"rank {outcome.rank} ended with {signal_name(outcome.code)}"
    if outcome.kind == "done":
        return Decision(False, 0, f"done; {silent}")
    if outcome.kind == "stop":
        return Decision(False, int(ExitCode.STOP), f"{last_line(log)} (rank {outcome.rank}; log: {log}); {silent}")
    if not isinstance(error, TimeoutError) and _asked_to_cancel(folder):
        return Decision(False, CANCELLED, f"cancelled; {name}; {silent}")
    before, budget_spent = _in_a_row(reports), _crashes(reports) >= max_restarts
    reason = "preempted" if outcome.kind == "requeue" and preempted else "hang" if outcome.code in HANGS else "crash"
    if reason != "preempted" and (before >= MAX_WITHOUT_CHECKPOINT or budget_spent):
        of_budget = f"the budget of {max_restarts} restarts is spent, and " if budget_spent else ""
        why = f"{name}: {last_line(log)} (log: {log}); not started again, {of_budget}{silent}"
        then = f"as at the end of {before} starts before; when that is mended, `loupe runs resume` goes on"
        return Decision(False, int(ExitCode.STOP), f"{why}, {then}")
    note = {"reason": reason, "code": outcome.code, "rank": outcome.rank, "time": time.time(), "unrecorded": silent}
    reports.mkdir(parents=True, exist_ok=True)
    (reports / UNRECORDED).write_text(json.dumps(note))
    return Decision(True, int(ExitCode.REQUEUE), f"{name}; {silent}, the restart is noted in {reports / UNRECORDED}")


def decide_or_note(
    folder: RunFolder, reports: Path, outcome: Outcome, *, preempted: bool, max_restarts: int, log: Path
) -> Decision:  # fmt: skip
    """`decide`, or where the run folder fails, `decide_unrecorded`.

    Args:
        reports: folder of this start, JOB.RESTART, on a disk that is not the run folder's where that is remote.
    """

    def ask() -> Decision:
        record_late(folder, reports)
        return decide(folder, outcome, preempted=preempted, max_restarts=max_restarts, log=log)

    try:
        return within_limit(ask, f"to read and write {folder.url}/{JOB}")
    except Exception as e:  # of storage, or of a damaged record, which is no reason to stop training
        show_bug(e)
        return decide_unrecorded(
            folder, reports, outcome, preempted=preempted, max_restarts=max_restarts, log=log, error=e
        )


def show_bug(error: Exception) -> None:
    """The traceback, of what is neither storage's nor a damaged record's error."""
    if not isinstance(error, (UserError, json.JSONDecodeError, *storage_errors())):
        traceback.print_exception(error)


def _asked_to_cancel(folder: RunFolder) -> bool:
    """False too where that cannot be read."""
    try:
        return call_within(lambda: asked_to_cancel(folder), time.monotonic() + CANCEL_S, "cancel") is not None
    except Exception as e:  # whatever kept the end from being recorded
        print(f"warning: {folder.url}/{CANCEL}: cannot be read ({one_line(e)})", flush=True)
        return False


def record_late(folder: RunFolder, reports: Path) -> None:
    """Put into `job.json` the restarts of this job that it does not know of. Of what step they were is not known: as the
    last that it knows."""
    late = [path for notes in _earlier(reports) if (path := notes / UNRECORDED).exists()]
    if not late:
        return
    history = folder.read_json(JOB)["restarts"]
    last = history[-1] if history else {"step": -1}
    known = {name: last[name] for name in ("step", "checkpoint", "train_seconds") if name in last}
    update_job(folder, restarts=[*history, *({**json.loads(path.read_text()), **known} for path in late)])
    for path in late:
        path.rename(path.with_name(RECORDED))


def _in_a_row(reports: Path) -> int:
    """Starts just before this one that ended without a record, and without having saved."""
    count = 0
    for notes in reversed(_earlier(reports)):
        if not (notes / UNRECORDED).exists() or _reason(notes / UNRECORDED) == "preempted":
            break
        count += 1
    return count


def _crashes(reports: Path) -> int:
    """Of the starts before this one, those that ended otherwise than asked and without a record, put in later or not."""
    notes = [folder / name for folder in _earlier(reports) for name in (UNRECORDED, RECORDED)]
    return sum(_reason(path) != "preempted" for path in notes if path.exists())


def _reason(note: Path) -> str:
    return str(json.loads(note.read_text())["reason"])


def _earlier(reports: Path) -> list[Path]:
    """The folders of reports of this job's earlier starts."""
    job, restart = _job_and_restart(reports)
    return [reports.with_name(f"{job}.{n}") for n in range(restart)]


def _job_and_restart(reports: Path) -> tuple[str, int]:
    job, _, restart = reports.name.rpartition(".")
    return job, int(restart)
