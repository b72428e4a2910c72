"""Metrics of one rank: exported on /metrics, and on rank 0 written to the run folder and printed.

Values live on the device until they are due: recording a step costs no host synchronisation.
"""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import prometheus_client
import torch
import torch.distributed as dist
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from torch import Tensor

from trainer import metric_names
from trainer.errors import UserError
from trainer.metric_names import Metric

_TYPES = {"counter": Counter, "gauge": Gauge, "info": Info}


class Exporter:
    """One registry, holding every metric of `metric_names` and nothing else of ours."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._server: Any = None
        self._series: dict[str, Any] = {}
        for metric in metric_names.ALL:
            if metric.kind == "histogram":
                series: Any = Histogram(
                    metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry
                )
            else:
                series = _TYPES[metric.kind](metric.name, metric.help, metric.labels, registry=self.registry)
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

    def clear(self, metric: Metric) -> None:
        """Forget a labelled metric's series, so that a phase that is over is no longer shown."""
        self._series[metric.name].clear()

    def serve(self, address: str, port: int) -> int:
        """Answer /metrics in a background thread; returns the port, the one chosen where `port` is 0.

        Raises:
            UserError: the address or port cannot be had.
        """
        try:
            self._server, _ = prometheus_client.start_http_server(port, addr=address, registry=self.registry)
        except OSError as e:
            raise UserError(
                f"metrics.port: cannot listen on {address}:{port} ({e.strerror}); take another, or 0 for any"
            ) from None
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop answering."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class LossMeter:
    """Mean of each loss term over the samples of an interval, over all ranks. Skipped steps are left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], skip: Tensor) -> None:
        """`terms`: detached, one value a sample. `skip`: 1.0 on the device for a step that does not count."""
        for name, values_B in terms.items():
            total = self._sums.setdefault(name, torch.zeros(2, dtype=torch.float64, device=self._device))
            sample = torch.stack([values_B.double().sum(), values_B.new_full((), values_B.numel()).double()])
            total += torch.where(skip > 0, torch.zeros_like(sample), sample)

    def take(self) -> dict[str, float]:
        """The means, and start over. A collective: every rank must have recorded the same terms. Waits for the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(totals)
        self._sums.clear()
        return {
            name: total / count
            for name, (total, count) in zip(names, totals.tolist(), strict=True)
            if count
        }  # fmt: skip


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
