"""How far a stage is, over all of its workers wherever they run: read from its folder alone."""

import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from data.stages import leases
from data.stages.runner import pass_folder
from data.stages.store import SUMMARY, StageStore, read_stage

SPEED_OVER_S = 120.0


@dataclass
class PassStatus:
    name: str
    items: int | None = None
    """None: the pass has not begun."""
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Item to the reason of its last failure."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of items that are whole."""
    holders: list[tuple[str, leases.Holder]] = field(default_factory=list)
    """Items in work, and by whom."""
    in_work: int = 0
    """Samples of those so far, by their leases."""


@dataclass
class StageStatus:
    stage: str
    passes: list[PassStatus]
    finished: bool
    samples_per_s: float | None = None

    @property
    def current(self) -> PassStatus:
        """The pass at work: the last that has begun."""
        return next((p for p in reversed(self.passes) if p.items is not None), self.passes[0])


class Watcher:
    """Looks again and again; each receipt is read once."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            UserError: no stage has begun there.
        """
        self._store = StageStore(url)
        self._stage = read_stage(self._store)
        self._passes = {name: PassStatus(name) for name in self._stage["passes"]}
        self._read: dict[str, set[str]] = {name: set() for name in self._passes}
        self._seen: deque[tuple[float, int]] = deque()

    def poll(self) -> StageStatus:
        for status in self._passes.values():
            self._look(status)
        finished = self._store.exists(SUMMARY)
        result = StageStatus(self._stage["stage"], list(self._passes.values()), finished)
        result.samples_per_s = self._speed(sum(_samples(p.counts) + p.in_work for p in result.passes))
        return result

    def _look(self, status: PassStatus) -> None:
        folder = pass_folder(status.name)
        if status.items is None:
            if not self._store.exists(f"{folder}/items.json"):
                return
            status.items = len(self._store.read_json(f"{folder}/items.json"))
        if status.done == status.items:
            return
        for name in self._store.names(f"{folder}/done"):
            if name not in self._read[status.name]:
                self._read[status.name].add(name)
                status.counts.update(self._store.read_json(f"{folder}/done/{name}")["counts"])
        status.done = len(self._read[status.name])
        status.holders = []
        for item, generation in leases.held(self._store.names(f"{folder}/leases")).items():
            found = leases.holder(self._store, f"{folder}/leases", item, generation)
            if found and f"{item}.json" not in self._read[status.name]:
                status.holders.append((item, found))
        status.in_work = sum(holder.samples for _, holder in status.holders)
        status.failed = {}
        for name in self._store.names(f"{folder}/failed"):
            item = name.removesuffix(".json").rpartition(".")[0]
            if item not in status.failed and f"{item}.json" not in self._read[status.name]:
                with suppress(FileNotFoundError):  # --retry-failed, meanwhile
                    status.failed[item] = str(self._store.read_json(f"{folder}/failed/{name}")["why"])

    def _speed(self, samples: int) -> float | None:
        now = time.monotonic()
        self._seen.append((now, samples))
        while len(self._seen) > 2 and now - self._seen[0][0] > SPEED_OVER_S:
            self._seen.popleft()
        began, before = self._seen[0]
        return (samples - before) / (now - began) if now - began > 1 else None


def _samples(counts: Mapping[str, int]) -> int:
    return counts.get("read", 0)


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """`name: number`, what was kept first and what was not by reason."""
    first = [name for name in ("read", "kept") if name in counts]
    rest = sorted((name for name in counts if name not in first), key=lambda name: (name.count("/"), name))
    return [f"{name}: {counts[name]:,}" for name in (*first, *rest)]
