"""Which rank do the others wait for?

Ranks that compute together are equally fast to the clock: all wait for the slowest, within collectives. So what is measured
is a rank's own time, in the pieces of a step in which it needs nobody: from the step's last collective (is the step fit?)
through the optimizer and the average, the wait for data, the copy and the frozen encoders, to the first collective of the next
one. A rank with a slow disk, loader, processor or GPU takes longer for these; how much slower its passes through the trained
model are does not show beside, since collectives lie in between them.
"""

import platform
import statistics
from collections.abc import Iterable

import torch
from torch import nn

from trainer import metric_names
from trainer.config import MetricsConfig
from trainer.parallel.world import World
from trainer.reports import Reports
from trainer.stage_times import Clock, Mark

_LEAST_SHARE = 0.02
"""Of a step, that a straggler costs the others: less is no more than noise on short pieces."""


class OwnTime:
    """Seconds between `open` and `close`, summed, of the device's own clock: where the host is ahead, what it waits for costs
    nothing, and is not counted."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._opened: Mark | None = None
        self._pairs: list[tuple[Mark, Mark]] = []

    def open(self) -> None:
        """A piece begins; one that was left open does not count."""
        self._opened = self._clock.now()

    def close(self) -> None:
        """A piece ends, if there is one."""
        if self._opened is not None:
            self._pairs.append((self._opened, self._clock.now()))
            self._opened = None

    def take(self) -> float:
        """The sum, and start over. Waits for the device."""
        if self._pairs:
            self._clock.await_(self._pairs[-1][1])
        seconds = sum(self._clock.seconds(begin, end) for begin, end in self._pairs)
        self._pairs.clear()
        return seconds


class Stragglers:
    """Compares the ranks' own times over windows of steps."""

    def __init__(self, config: MetricsConfig, world: World, reports: Reports, modules: Iterable[nn.Module]) -> None:
        """`modules`: sharded ones; the first forward pass of any begins with a collective."""
        self.own = OwnTime(world.device)
        self._config, self._world, self._reports = config, world, reports
        self._steps = 0
        self._seconds = 0.0
        self._suspects: set[int] = set()
        self._slow: set[int] = set()
        for module in modules:
            # in front of FSDP's own hook, which gathers the parameters
            module.register_forward_pre_hook(self._at_first_collective, prepend=True)

    def _at_first_collective(self, module: nn.Module, args: object) -> None:
        self.own.close()

    def count(self, seconds: float) -> None:
        """A step is done, in so many seconds."""
        self._steps += 1
        self._seconds += seconds

    def tell(self) -> None:
        """Once a window: each rank's time to its metrics; a note on who is behind in two of them, and on who has caught up. A
        collective."""
        if self._steps < self._config.straggler_steps:
            return
        own_s, step_s = self.own.take() / self._steps, self._seconds / self._steps
        steps, self._steps, self._seconds = self._steps, 0, 0.0
        found = self._world.gather((own_s, platform.node()))
        # the lower one of two: the mean of both would hide how much slower one is
        median_s = statistics.median_low(seconds for seconds, _ in found)
        of = self._reports.exporter.of
        of(metric_names.OWN_SECONDS).set(own_s)
        of(metric_names.OWN_RATIO).set(own_s / median_s if median_s else 1.0)
        if self._config.straggler_ratio is None:
            return
        slow = {
            rank: seconds
            for rank, (seconds, _) in enumerate(found)
            if seconds > self._config.straggler_ratio * median_s and seconds - median_s > _LEAST_SHARE * step_s
        }
        for rank, seconds in slow.items():
            # of two windows in a row: a busy moment is not a slow rank
            if rank in self._suspects and rank not in self._slow:
                node = found[rank][1]
                # a GPU that never has to wait may take no time at all
                ratio = seconds / max(median_s, 1e-6)
                self._reports.note(
                    f"WARNING: rank {rank} (node {node}) is {ratio:.2f}x the median of ranks over the last {steps} steps: its "
                    f"own part of a step takes {seconds:.3g} s, the others' {median_s:.3g} s, and they wait for it, "
                    f"{(seconds - median_s) / step_s:.0%} of a step",
                    straggler={"rank": rank, "node": node, "ratio": ratio, "own_s": seconds, "median_s": median_s},
                )
        for rank in sorted(self._slow - slow.keys()):
            self._reports.note(f"rank {rank} (node {found[rank][1]}) keeps step with the others again")
        self._slow = slow.keys() & (self._slow | self._suspects)
        self._suspects = set(slow)
