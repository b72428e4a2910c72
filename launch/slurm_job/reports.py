"""What the tasks of a start leave for the end of its batch script and for the next submission, on a disk that all see: how
each rank has ended, and when rank 0 was asked to stop. No torch.

srun's own exit code is the highest of all tasks, those that it killed included: it cannot say what happened.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from launch.cancellation import CANCELLED
from launch.slurm_job.requeued import DECISION
from trainer.errors import ExitCode

ASKED = "asked.json"
"""File beside the ranks' reports of a start: the first request to stop that reached rank 0."""


def starts_dir(work_dir: str) -> Path:
    return Path(work_dir, "slurm", "exits")


def exits_dir(work_dir: str) -> Path:
    """Of this start. Its script empties it before the tasks: a cluster that has lost its state counts jobs anew."""
    job_id, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    return starts_dir(work_dir) / f"{job_id}.{restart}"


def report_exit(
    work_dir: str, rank: int, code: int, *, stop_requested: bool, stop_s: float | None = None, asked_by: str | None = None
) -> None:  # fmt: skip
    """
    Args:
        stop_s: seconds from the request to stop to the rank's end.
        asked_by: name of the signal that was the request.
    """
    node = os.environ.get("SLURM_NODEID", "0")
    report = {
        "code": code, "stop_requested": stop_requested, "stop_s": stop_s, "time": time.time(), "node": node,
        "asked_by": asked_by,
    }  # fmt: skip
    _write(exits_dir(work_dir) / f"rank-{rank}.json", report)


def exits_here(work_dir: str) -> dict[int, dict[str, Any]]:
    """What the ranks of this start have reported, by rank."""
    found = {}
    for path in exits_dir(work_dir).glob("rank-*.json"):
        found[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    return found


def note_asked(work_dir: str, signal_name: str) -> None:
    """A time limit that comes before the save is through kills all that could tell of it: this is told before."""
    try:
        _write(exits_dir(work_dir) / ASKED, {"signal": signal_name, "time": time.time()})
    except OSError as e:  # it is a signal's handler that calls this: the rank must have its signal all the same
        print(f"warning: {ASKED}: the request to stop is not noted ({e})", flush=True)


def warned_in_vain(work_dir: str, since: float) -> bool:
    """Whether the last warning of a time limit came too late: rank 0 has not saved, and it was the job's end.

    Args:
        since: Unix time of the submission that is meant.
    """
    marks = [(path.stat().st_mtime, path) for path in starts_dir(work_dir).glob(f"*/{ASKED}")]
    if not marks:
        return False
    asked_at, newest = max(marks)
    if asked_at < since or json.loads(newest.read_text())["signal"] != "SIGUSR2":
        return False
    report = newest.with_name("rank-0.json")
    if report.exists() and json.loads(report.read_text())["code"] in (ExitCode.DONE, ExitCode.REQUEUE):
        return False  # how long it took is in `job.json`
    for path in starts_dir(work_dir).glob(f"*/{DECISION}"):
        # what ends with the time limit's own SIGTERM was through no sooner than that
        own_end = path.parent == newest.parent and path.read_text().strip() == str(CANCELLED)
        if path.stat().st_mtime >= asked_at and not own_end:
            return False
    return True


def _write(path: Path, what: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(what))
    temporary.replace(path)
