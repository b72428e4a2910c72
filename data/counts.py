"""What the processes of the stream count, on its way to the trainer's metrics."""

import threading
from typing import TypeAlias

from trainer.metric_names import Metric

Sums: TypeAlias = dict[tuple[str, ...], float]
"""(metric's name, labels' values ...) to what to add; of a gauge, its value."""


class Counts:
    """Sums since they were last taken. Threads may share one; a process that it is pickled to begins with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Sums = {}

    def add(self, metric: Metric, amount: float = 1.0, *labels: str) -> None:
        key = (metric.name, *labels)
        with self._lock:
            self._sums[key] = self._sums.get(key, 0.0) + amount

    def set(self, metric: Metric, value: float) -> None:
        """Of a gauge."""
        with self._lock:
            self._sums[metric.name,] = value

    def take(self) -> Sums:
        """What was counted since the last call."""
        with self._lock:
            sums, self._sums = self._sums, {}
            return sums

    def __reduce__(self) -> tuple[type["Counts"], tuple[()]]:
        return Counts, ()
