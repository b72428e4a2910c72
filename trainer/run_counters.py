"""Counters that are the run's, not a process's: they go on over restarts. Exported by rank 0. No torch."""

from collections.abc import Collection, Mapping
from typing import Any

from trainer import metric_names, restarts
from trainer.exporter import Exporter
from trainer.goodput import Counters
from trainer.run_folder import HANGS, JOB, RunFolder

OF_THE_RUN = (
    metric_names.STEPS, metric_names.IMAGES, metric_names.STEPS_SKIPPED, metric_names.ROLL_BACKS,
    metric_names.CHECKPOINT_FAILURES, metric_names.BAD_SAMPLES,
)  # fmt: skip
"""Kept in goodput/NNNN.json; after a kill they go on from at most `goodput_keeper.WRITE_S` before it."""
SUBMITTED_AGAIN = "submitted again"
"""Reason of a restart that no job has decided on."""


def begin_at_zero(exporter: Exporter, sinks: Collection[str]) -> None:
    """Counters with labels, in every rank: of one that first appears with its first event Prometheus sees no increase."""
    for kind in metric_names.FETCH_ERROR_KINDS:
        exporter.of(metric_names.FETCH_ERRORS, kind)
    for sink in sinks:
        exporter.of(metric_names.SINK_FAILURES, sink)


def take_up(exporter: Exporter, counters: Counters) -> None:
    """Go on from what an earlier start has recorded."""
    for metric in OF_THE_RUN:
        for labels, value in counters.get(metric.name, ()):
            if len(labels) == len(metric.labels):
                exporter.of(metric, *labels).inc(value)


def counters_of(exporter: Exporter) -> Counters:
    return {metric.name: exporter.values(metric) for metric in OF_THE_RUN}


def at_least(exporter: Exporter, *, steps: int, images: int, roll_backs: int) -> None:
    """What a checkpoint says: more than the record does where a start before kept none, or was killed after it."""
    for metric, least in (
        (metric_names.STEPS, steps), (metric_names.IMAGES, images), (metric_names.ROLL_BACKS, roll_backs)
    ):  # fmt: skip
        now = exporter.total(metric)
        if least > now:
            exporter.of(metric).inc(least - now)


class Goodput:
    """Gives `loupe_goodput_seconds_total` what the ledger says."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._told: dict[str, float] = {}
        for state in metric_names.GOODPUT_STATES:
            exporter.of(metric_names.GOODPUT, state)

    def tell(self, totals: Mapping[str, float]) -> None:
        """A counter never goes down: what the compiler took is taken off a state that has told it already, once."""
        for state, seconds in totals.items():
            told = self._told.get(state, 0.0)
            if seconds > told:
                self._exporter.of(metric_names.GOODPUT, state).inc(seconds - told)
                self._told[state] = seconds


class Restarts:
    """What job.json says of restarts; read once, as it gets a new one only between two starts."""

    def __init__(self, exporter: Exporter, folder: RunFolder) -> None:
        self._exporter = exporter
        job: dict[str, Any] = folder.read_json(JOB) if folder.exists(JOB) else {}
        earlier = _records(job.get("earlier"))
        self._restarts, self._max_restarts = _records(job.get("restarts")), job.get("max_restarts")
        for record in (*earlier, job):
            for entry in _records(record.get("restarts")):
                exporter.of(metric_names.RESTARTS, str(entry.get("reason"))).inc()
        if earlier:
            exporter.of(metric_names.RESTARTS, SUBMITTED_AGAIN).inc(len(earlier))
        exporter.of(metric_names.WORKER_DEATHS).inc(len(folder.names("worker_deaths")))
        exporter.of(metric_names.HANGS).inc(len(folder.names(HANGS)))
        # as it was when the newest restart was decided on, until the restore says more
        newest = self._restarts[-1] if self._restarts else {}
        self.tell(train_seconds=float(newest.get("train_seconds") or 0.0), checkpoint=int(newest.get("checkpoint", -1)))

    def tell(self, *, train_seconds: float, checkpoint: int) -> None:
        """
        Args:
            train_seconds: of the run until now, in the steps that stand.
            checkpoint: step of the newest; -1 where there is none.
        """
        used, budget = restarts.used_of_budget(self._restarts, train_seconds), self._max_restarts
        left = 1.0 - used / budget if isinstance(budget, int) and budget > 0 else 1.0 if not used else 0.0
        self._exporter.of(metric_names.RESTARTS_LEFT).set(max(0.0, left))
        in_place = restarts.without_checkpoint(self._restarts, checkpoint)
        self._exporter.of(metric_names.RESTARTS_IN_PLACE).set(in_place)


def _records(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
