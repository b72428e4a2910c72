"""The state of a run, from its folder alone. No torch."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from launch.console import MetricsTail
from launch.job import live_job
from trainer.run_folder import CONFIG, JOB, SUMMARY, RunFolder


@dataclass(frozen=True)
class Status:
    name: str
    state: str
    """In words, with what it runs as or how it ended."""
    last: dict[str, Any] | None
    """Newest record of the metrics."""
    starts: int
    restarts: dict[str, int]
    """Restarts by reason."""


def status_of(folder: RunFolder) -> Status:
    """Raises UserError where the run's scheduler cannot be asked, or a file of the folder is damaged."""
    files = MetricsTail(folder).poll()
    job = folder.read_json(JOB) if folder.exists(JOB) else {}
    name = folder.config().name if folder.exists(CONFIG) else "?"
    restarts = Counter(str(entry["reason"]) for entry in job.get("restarts", []))
    return Status(
        name=name,
        state=_state(folder, job),
        last=next((file.records[-1] for file in reversed(files) if file.records), None),
        starts=len(folder.names("attempts")),
        restarts=dict(restarts),
    )


def _state(folder: RunFolder, job: dict[str, Any]) -> str:
    live = live_job(folder)
    if live:
        return f"running as {live}"
    return end_of(folder) or "not started by a launcher"


def end_of(folder: RunFolder) -> str | None:
    """How the run ended, in words; None while a job of it lives, or where only its trainer could say."""
    if live_job(folder):
        return None
    job = folder.read_json(JOB) if folder.exists(JOB) else None
    if job is None:
        return "finished" if folder.exists(SUMMARY) else None
    ended = job.get("ended")
    if ended is None:
        return (
            "ended without a word: killed, or its machine was lost; the same command goes on from its newest checkpoint"
        )
    return "done" if ended["code"] == 0 else f"stopped with code {ended['code']}: {ended['why']}"
