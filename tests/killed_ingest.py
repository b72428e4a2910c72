"""A worker that dies. By itself, so that the process started for it imports little."""

import os
import signal
from typing import Any

import data.ingest.from_tars as from_tars
from data.ingest.stage import IngestStage
from data.stages.runner import Worker
from data.stages.store import StageStore


def die_at(out: str, tar: str, sample: int) -> None:
    """A worker that the kernel kills in the midst of a tar."""
    from_tars.PART_SAMPLES = 20
    take, taken = from_tars._take, []

    def counted(*args: Any) -> None:
        taken.append(1)
        if len(taken) == sample:
            os.kill(os.getpid(), signal.SIGKILL)
        take(*args)

    from_tars._take = counted  # type: ignore[assignment]
    Worker(IngestStage([tar]), StageStore(out), lease_s=1.0).run()
