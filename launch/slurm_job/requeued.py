"""Starts that SLURM itself ended and queued again: for a lost node, by `scontrol requeue`, by a preemption without time to
save. Nothing of ours was left to decide then, or it was not ours to; the next start records it. No torch."""

import time
from pathlib import Path

from launch.job import update_job
from launch.reached import reached
from trainer.errors import ExitCode
from trainer.restarts import REQUEUED
from trainer.run_folder import JOB, RunFolder

DECISION = "decision"
"""File beside the ranks' reports of a start: the exit code that the end of its batch script decided on."""


def record_requeue(folder: RunFolder, reports: Path) -> None:
    """Put the end of the start before this one into `job.json`, where that start did not do so.

    Args:
        reports: folder of this start's reports, JOB.RESTART.
    """
    job, _, restart = reports.name.rpartition(".")
    if restart == "0" or not folder.exists(JOB):
        return
    decision = reports.with_name(f"{job}.{int(restart) - 1}") / DECISION
    if decision.exists() and decision.read_text().strip() == str(int(ExitCode.REQUEUE)):
        return
    history = folder.read_json(JOB)["restarts"]
    now = reached(folder, history).as_record()
    entry = {"reason": REQUEUED, "code": None, "rank": None, **now, "time": time.time()}
    update_job(folder, restarts=[*history, entry])
