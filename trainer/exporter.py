"""Metrics of one process on /metrics. No torch: data workers use it, and so do commands that never train."""

import errno
from collections.abc import Collection, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from trainer import metric_names
from trainer.errors import UserError
from trainer.metric_names import Metric
from trainer.metrics_server import OPEN, Access, start

_TYPES = {"counter": Counter, "gauge": Gauge, "info": Info}


class Exporter:
    """One registry, with metrics of `metric_names`.

    Args:
        metrics: that are exported, such as `metric_names.OF_EVERY_RANK`. The others can be set all the same: who counts need
            not know who exports. One without labels stands at 0 from the beginning.
    """

    def __init__(self, metrics: Collection[Metric] = metric_names.ALL) -> None:
        self.registry = CollectorRegistry()
        self._server: Any = None
        self._series: dict[str, Any] = {}
        for metric in metric_names.ALL:
            registry = self.registry if metric in metrics else None
            if metric.kind == "histogram":
                series: Any = Histogram(
                    metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
                )
            else:
                series = _TYPES[metric.kind](metric.name, metric.help, metric.labels, registry=registry)
            self._series[metric.name] = series

    def of(self, metric: Metric, *labels: str) -> Any:
        """The prometheus-client object to set, increase or observe."""
        series = self._series[metric.name]
        return series.labels(*labels) if metric.labels else series

    def add(self, sums: Mapping[tuple[str, ...], float]) -> None:
        """What another process has counted: (metric's name, labels' values ...) to what to add; of a gauge, its value."""
        for (name, *labels), amount in sums.items():
            series = self._series[name].labels(*labels) if labels else self._series[name]
            if isinstance(series, Gauge):
                series.set(amount)
            else:
                series.inc(amount)

    def values(self, metric: Metric) -> list[tuple[tuple[str, ...], float]]:
        """Of a counter or gauge: (values of the labels, value) of each of its series."""
        families = self._series[metric.name].collect()
        return [
            (tuple(sample.labels[label] for label in metric.labels), float(sample.value))
            for family in families
            for sample in family.samples
            if sample.name == metric.name
        ]

    def remove(self, metric: Metric, *labels: str) -> None:
        """Forget one of its series; of a counter, so that it may begin anew."""
        self._series[metric.name].remove(*labels)

    def total(self, metric: Metric) -> float:
        """Of a counter or gauge, over all its series."""
        return sum(value for _, value in self.values(metric))

    def clear(self, metric: Metric) -> None:
        """Forget a labelled metric's series, so that a phase that is over is no longer shown."""
        self._series[metric.name].clear()

    def serve(self, address: str, port: int, *, access: Access = OPEN, tries: int = 1) -> int:
        """Answer /metrics in a background thread; returns the port, the one chosen where `port` is 0.

        Args:
            tries: so many ports, from `port` on, until one is free.

        Raises:
            UserError: the address or none of the ports can be had, or a file of `access` cannot be read.
        """
        for candidate in range(port, min(port + tries, 65_536)) if port else (0,):
            try:
                self._server = start(candidate, address, self.registry, access)
                return int(self._server.server_port)
            except OSError as e:
                if e.errno != errno.EADDRINUSE or candidate == min(port + tries, 65_536) - 1:
                    upto = f" to {candidate}" if candidate > port else ""
                    raise UserError(
                        f"metrics.port: cannot listen on {address}:{port}{upto} ({e.strerror}); take another, or 0 for any"
                    ) from None
        raise AssertionError("no port to try")

    def close(self) -> None:
        """Stop answering."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
