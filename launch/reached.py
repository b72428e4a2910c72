"""How far a run has come, for whoever decides about a restart: seconds count then, and records may be damaged. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.run_folder import CHECKPOINTS, RunFolder

TAIL_BYTES = 64 << 10
"""Read of the end of a metrics file: of a long run all of it takes half a minute on a busy node."""
NUM_FILES = 4
"""Metrics files that are looked into, newest first; of those before, the restarts since then say it."""


@dataclass(frozen=True)
class Reached:
    step: int
    """Newest in the metrics, over all starts; -1 before the first."""
    checkpoint: int
    """Step of the newest checkpoint that is committed and not set aside; -1 where there is none."""
    train_seconds: float
    """Of training, in the steps that stand."""

    def as_record(self) -> dict[str, Any]:
        """What an entry of `restarts` in job.json has of it."""
        return asdict(self)


def reached(folder: RunFolder, restarts: Sequence[Mapping[str, Any]] = ()) -> Reached:
    """
    Args:
        restarts: of job.json, oldest first.

    Raises:
        OSError, CheckpointError: storage does not give it; object stores' clients raise what they like.
    """
    step = max((int(entry["step"]) for entry in restarts), default=-1)
    found = (folder.last_step_record(name, TAIL_BYTES) for name in _newest_metrics(folder))
    newest = [record for record in found if record]
    committed = [entry.step for entry in CheckpointFolder(f"{folder.url}/{CHECKPOINTS}").entries() if entry.committed]
    return Reached(
        max([step, *(int(record["step"]) for record in newest)]),
        max(committed, default=-1),
        float(newest[0].get("train_seconds") or 0.0) if newest else 0.0,
    )


def _newest_metrics(folder: RunFolder) -> list[str]:
    names = [name for name in folder.names("metrics") if name.endswith(".jsonl")]
    return [f"metrics/{name}" for name in reversed(names[-NUM_FILES:])]
