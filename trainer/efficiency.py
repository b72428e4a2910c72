"""How much of what the devices can do a run's steps use."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from trainer import metric_names
from trainer.exporter import Exporter
from trainer.flops import PARTS, StepFlops
from trainer.parallel.world import World
from trainer.peak_flops import Peak, peak_of

_T = 1e12


class Efficiency:
    """MFU of each interval: counted operations a second over the device's peak."""

    def __init__(
        self, world: World, exporter: Exporter, flops: StepFlops, peak_flops: float | None, note: Callable[..., None]
    ) -> None:  # fmt: skip
        """
        Args:
            flops: what counts.
            peak_flops: operations a second of one device, where the config says so.
            note: tells, and records, something besides the steps.
        """
        self._world, self._exporter, self._flops, self._note = world, exporter, flops, note
        self._configured = peak_flops
        self._peak: Peak | None = None
        self._steps: Counter[Hashable] = Counter()
        self._of_all: dict[Hashable, Mapping[str, float]] = {}
        """Of one step, all ranks together, by part."""
        self._told: set[Hashable] = set()

    def count(self, kind: Hashable) -> None:
        """A step of this kind is done."""
        if self._flops.enabled:
            self._steps[kind] += 1

    def tell(self, seconds: float) -> dict[str, float]:
        """Over an interval of so many seconds; what the record has of it. A collective where a kind is new."""
        steps, self._steps = self._steps, Counter()
        if not steps:
            return {}
        for kind in steps:
            if kind not in self._of_all:
                self._collect(kind)
        of = self._exporter.of
        newest = self._of_all[next(reversed(steps))]
        for part in PARTS:
            of(metric_names.FLOPS, part).set(newest.get(part, 0.0))
        done = sum(sum(self._of_all[kind].values()) * number for kind, number in steps.items())
        # a step without a count would take part in the time alone
        if not all(self._of_all[kind] for kind in steps) or not done or not seconds or self._peak is None:
            of(metric_names.FLOPS_PER_SECOND).set(0)
            of(metric_names.MFU).set(0)
            return {}
        speed = done / seconds / self._world.size
        of(metric_names.FLOPS_PER_SECOND).set(speed)
        of(metric_names.MFU).set(speed / self._peak.flops)
        return {"flops_per_s": speed, "mfu": speed / self._peak.flops}

    def _collect(self, kind: Hashable) -> None:
        """All ranks' counts of a step: which samples a perceptual loss takes is drawn, and differs between them."""
        counts = self._world.gather(self._flops.counts[kind])
        sums: Counter[str] = Counter()
        for count in counts:
            sums.update(count.parts)
        trouble = next((count.trouble for count in counts if count.trouble), None)
        # a part of it would be a wrong MFU
        self._of_all[kind] = {} if trouble else dict(sums)
        if trouble:
            self._note(
                f"WARNING: no MFU, as the operations of a step could not be counted ({trouble}); training goes on"
            )
            return
        if self._peak is None:
            self._peak = peak_of(self._world.device, self._configured)
            self._exporter.of(metric_names.PEAK_FLOPS, self._peak.source).set(self._peak.flops)
        group = kind[:2] if isinstance(kind, tuple) else kind
        if group in self._told:  # another shape of the same phase
            return
        self._told.add(group)
        total = sum(sums.values())
        shares = ", ".join(f"{part} {sums[part] / total:.1%}" for part in PARTS if sums[part])
        facts: dict[str, Any] = {"parts": dict(sums), "count_seconds": round(max(c.seconds for c in counts), 3)}
        self._note(
            f"a step is {total / _T:.4g} TFLOP on all ranks ({shares or 'nothing counted'}), counted in "
            f"{facts['count_seconds']:.2g} s; a device can do {self._peak.flops / _T:.4g} TFLOP/s ({self._peak.source})",
            flops={**facts, "peak_flops": self._peak.flops, "peak_source": self._peak.source},
        )
