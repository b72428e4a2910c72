"""A stage's progress as metrics: what its folder says of all workers, wherever they run; so every process says the same."""

import time
from collections.abc import Mapping

from data.stages.status import PassStatus, StageStatus
from trainer import metric_names as names
from trainer.exporter import Exporter
from trainer.metric_names import Metric

_TOKENS = "tokens"
_SAMPLES = ("read", "kept")
_NOT_KEPT = ("rejected/", "missing/")


class StageMetrics:
    """Exports `metric_names.OF_STAGES`."""

    def __init__(self, stage: str) -> None:
        self.exporter = Exporter(names.OF_STAGES)
        self._stage = stage
        self._counted: dict[tuple[str, ...], float] = {}
        """(metric's name, labels' values ...) to what it stands at."""
        # from the beginning: of a counter that first appears at its end there is no rate
        self._to(names.DATA_STAGE_TOKENS, 0, stage)
        self._to(names.DATA_STAGE_BYTES, 0, stage)
        self._to(names.DATA_STAGE_DEATHS, 0, stage)
        self.exporter.of(names.DATA_STAGE_SPEED, stage).set(0)

    def update(self, status: StageStatus) -> None:
        of, stage = self.exporter.of, self._stage
        for one in status.passes:
            if one.items is None:
                continue
            for state, number in items_by_state(one).items():
                of(names.DATA_STAGE_ITEMS, stage, one.name, state).set(number)
            counts = {**dict.fromkeys(_SAMPLES, 0), **one.counts}
            for what, number in counts.items():
                if what in _SAMPLES or what.startswith(_NOT_KEPT):
                    self._to(names.DATA_STAGE_SAMPLES, number, stage, one.name, what)
                elif what != _TOKENS:
                    self._to(names.DATA_STAGE_COUNTS, number, stage, one.name, what)
        self._to(names.DATA_STAGE_TOKENS, sum(one.counts[_TOKENS] for one in status.passes), stage)
        self._to(names.DATA_STAGE_BYTES, sum(one.bytes for one in status.passes), stage)
        of(names.DATA_STAGE_IN_WORK, stage).set(sum(one.in_work for one in status.passes))
        if status.samples_per_s is not None:
            of(names.DATA_STAGE_SPEED, stage).set(0 if status.finished else status.samples_per_s)
        workers = {holder.worker for one in status.passes for _, holder in one.holders if holder.deadline > time.time()}
        of(names.DATA_STAGE_WORKERS, stage).set(len(workers))
        of(names.DATA_STAGE_LOOKED, stage).set_to_current_time()

    def died(self, workers: int) -> None:
        """So many workers of this machine have died since the beginning."""
        self._to(names.DATA_STAGE_DEATHS, workers, self._stage)

    def _to(self, metric: Metric, value: float, *labels: str) -> None:
        """Bring a counter to `value`; to less only where what was counted has been taken out again, which begins it anew."""
        key = (metric.name, *labels)
        before = self._counted.get(key, 0)
        if value < before:
            self.exporter.remove(metric, *labels)
            before = 0
        self.exporter.of(metric, *labels).inc(value - before)
        self._counted[key] = value


def items_by_state(one: PassStatus) -> Mapping[str, int]:
    """How many of a pass's items, by `metric_names.STAGE_ITEM_STATES`; they sum to all of them."""
    failed = len(one.failed)
    # one may have failed and be tried again
    working = len([item for item, _ in one.holders if item not in one.failed])
    waiting = max(0, (one.items or 0) - one.done - working - failed)
    given_up = len(one.given_up)
    done = one.done - given_up
    return {"waiting": waiting, "working": working, "done": done, "failed": failed, "given_up": given_up}
