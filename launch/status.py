"""How a run ended, from its folder alone. No torch."""

from launch.cancellation import CANCELLED, asked_to_cancel
from launch.job import live_job
from trainer.run_folder import JOB, SUMMARY, RunFolder


def end_of(folder: RunFolder) -> str | None:
    """How the run ended, in words; None while a job of it lives, or where only its trainer could say.

    Raises:
        UserError: the run's scheduler cannot be asked, or a file of the folder is damaged.
    """
    if live_job(folder):
        return None
    job = folder.read_json(JOB) if folder.exists(JOB) else None
    if job is None:
        return "finished" if folder.exists(SUMMARY) else None
    ended = job.get("ended")
    if ended is not None:
        if ended["code"] == CANCELLED:
            return str(ended["why"])
        return "done" if ended["code"] == 0 else f"stopped with code {ended['code']}: {ended['why']}"
    if asked_to_cancel(folder):
        return "cancelled; `loupe runs resume` goes on from its newest checkpoint"
    return "ended without a word: killed, or its machine was lost; the same command goes on from its newest checkpoint"
