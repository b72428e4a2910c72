"""How a run ended, in one JSON file."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.run_folder import RunFolder

_WINDOW = 3
"""Records at a phase's beginning and end whose mean is shown."""


def summarise(
    folder: RunFolder, config: RunConfig, *, images: int, train_seconds: float, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """`wall_s`: from the first start to now, restarts and waiting included; `images_per_s`: over training steps alone."""
    records = folder.metrics()
    attempts = folder.names("attempts")
    started = folder.read_json(f"attempts/{attempts[0]}")["time"]
    return {
        "status": "done",
        "steps": sum(phase.steps for phase in config.phases),
        "images_seen": images,
        "restarts": len(attempts) - 1,
        "wall_s": round(time.time() - started, 3),
        "images_per_s": round(images / train_seconds, 3) if train_seconds else 0.0,
        **extra,
        "phases": [
            {
                "name": phase.name,
                "steps": phase.steps,
                "losses_first": _mean_losses(of_phase[:_WINDOW]),
                "losses_last": _mean_losses(of_phase[-_WINDOW:]),
            }
            for phase in config.phases
            for of_phase in [[r for r in records if r["phase"] == phase.name]]
        ],
    }


def _mean_losses(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    terms = sorted({term for record in records for term in record["loss"]})
    return {
        term: sum(values) / len(values)
        for term in terms
        for values in [[record["loss"][term] for record in records if term in record["loss"]]]
    }
