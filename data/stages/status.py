"""How far a stage is, over all of its workers wherever they run: read from its folder alone.

A look costs what it must: names are listed again only when that has become cheap beside the time between, each receipt is read
once, several at a time, and what a look has no time to read the next ones catch up on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from data.ahead import in_order
from data.stages import failures, leases
from data.stages.receipts import READERS, pass_folder
from data.stages.runner import LISTING_S
from data.stages.store import SUMMARY, Json, StageStore, read_stage

T = TypeVar("T")

SPEED_OVER_S = 120.0
LOCAL_LISTING_S = 1.0
"""As `LISTING_S`, where a listing is no request that somebody pays for."""
POLL_WITHIN_S = 2.0
"""Of a look, about: what it may take to read receipts."""


@dataclass
class PassStatus:
    name: str
    items: int | None = None
    """None: the pass has not begun."""
    done: int = 0
    counted: int = 0
    """Items of those done whose samples are in `counts`."""
    failed: dict[str, str] = field(default_factory=dict)
    """Item to the reason of its last failure."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Item to the reason, of what the stage goes on without."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of items that are whole."""
    holders: list[tuple[str, leases.Holder]] = field(default_factory=list)
    """Items in work, and by whom."""
    in_work: int = 0
    """Samples of those so far, by their leases."""
    bytes: int = 0
    """Of files of the items in `counts`, as far as their receipts were read; a stage's summary does not tell."""


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
    """Looks again and again."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            UserError: no stage has begun there.
        """
        self._store = StageStore(url)
        self._stage = read_stage(self._store)
        self._passes = self._begin()
        self._seen: deque[tuple[float, int]] = deque()

    def poll(self, *, within_s: float = POLL_WITHIN_S) -> StageStatus:
        """
        Args:
            within_s: time for reading receipts, about; what is not read by then comes with the next look.
        """
        summary = self._summary()
        deadline = time.monotonic() + within_s
        if summary is None and any(one.ended for one in self._passes):  # it was finished, and is being mended
            self._passes = self._begin()
        for one in self._passes:
            if summary is not None:
                one.end(summary)
            else:
                one.look(deadline)
        result = StageStatus(self._stage["stage"], [one.status for one in self._passes], summary is not None)
        if all(one.complete for one in self._passes):  # else it would be the speed of our reading
            result.samples_per_s = self._speed(sum(_samples(p.counts) + p.in_work for p in result.passes))
        return result

    def _begin(self) -> "list[_PassWatch]":
        return [_PassWatch(self._store, name) for name in self._stage["passes"]]

    def _summary(self) -> Json | None:
        try:
            return self._store.read_json(SUMMARY)
        except FileNotFoundError:
            return None

    def _speed(self, samples: int) -> float | None:
        now = time.monotonic()
        self._seen.append((now, samples))
        while len(self._seen) > 2 and now - self._seen[0][0] > SPEED_OVER_S:
            self._seen.popleft()
        began, before = self._seen[0]
        return (samples - before) / (now - began) if now - began > 1 else None


class _PassWatch:
    def __init__(self, store: StageStore, name: str) -> None:
        self.status = PassStatus(name)
        self._store, self._folder = store, pass_folder(name)
        self.ended = False
        self._list_at = 0.0
        self._done: set[str] = set()
        self._counted: set[str] = set()
        self._held: dict[str, tuple[float, leases.Holder]] = {}
        """Item to when its lease was read, and what it said."""
        self._whys: dict[str, str] = {}

    @property
    def complete(self) -> bool:
        """All that is done is counted."""
        return self.status.counted == self.status.done

    def end(self, summary: Json) -> None:
        """The stage is finished: its summary has it all."""
        if self.ended:
            return
        self.ended, status = True, self.status
        status.items = status.done = status.counted = len(self._store.read_json(f"{self._folder}/items.json"))
        status.counts = Counter(summary["counts"].get(status.name, {}))
        status.given_up = dict(summary.get("given_up", {}).get(status.name, {}))
        status.holders, status.in_work, status.failed = [], 0, {}

    def look(self, deadline: float) -> None:
        status = self.status
        if status.items is None:
            try:
                status.items = len(self._store.read_json(f"{self._folder}/items.json"))
            except FileNotFoundError:
                return
        if status.counted == status.items:
            return
        if time.monotonic() >= self._list_at:
            self._list(deadline)
        self._count(deadline)

    def _list(self, deadline: float) -> None:
        began = time.monotonic()
        self._done = set(self._store.names(f"{self._folder}/done"))
        self.status.done = len(self._done)
        held = leases.held(self._store.names(f"{self._folder}/leases"))
        failed = failures.listed(self._store, self._folder)
        now = time.monotonic()
        least = LOCAL_LISTING_S if self._store.is_local else LISTING_S
        self._list_at = now + max(least, 10 * (now - began))
        self._hold({item: n for item, n in held.items() if f"{item}.json" not in self._done}, deadline)
        self._fail({item: files for item, files in failed.items() if f"{item}.json" not in self._done}, deadline)

    def _hold(self, held: Mapping[str, int], deadline: float) -> None:
        """Where there is not time for all, those of which we have known the longest are asked first."""
        self._held = {item: seen for item, seen in self._held.items() if item in held}
        order = sorted(held, key=lambda item: self._held[item][0] if item in self._held else 0.0)
        folder = f"{self._folder}/leases"
        for item, holder in _several(lambda i: leases.holder(self._store, folder, i, held[i]), order, deadline):
            if holder is not None:
                self._held[item] = (time.monotonic(), holder)
        self.status.holders = [(item, holder) for item, (_, holder) in sorted(self._held.items())]
        self.status.in_work = sum(holder.samples for _, holder in self.status.holders)

    def _fail(self, failed: Mapping[str, list[str]], deadline: float) -> None:
        last = {item: files[-1] for item, files in failed.items()}
        unread = [file for file in last.values() if file not in self._whys]
        for file, why in _several(lambda f: failures.reason(self._store, self._folder, f), unread, deadline):
            self._whys[file] = why
        self.status.failed = {item: self._whys.get(file, "its reason is not read yet") for item, file in last.items()}

    def _count(self, deadline: float) -> None:
        status = self.status
        if self._counted - self._done:  # mended meanwhile
            self._counted, status.counts, status.given_up, status.bytes = set(), Counter(), {}, 0
        for name, receipt in _several(self._receipt, sorted(self._done - self._counted), deadline):
            if receipt is None:
                continue
            self._counted.add(name)
            status.counts.update(receipt["counts"])
            status.bytes += sum(file["bytes"] for part in receipt["parts"] for file in part["files"].values())
            if (why := receipt.get("given_up")) is not None:
                status.given_up[receipt["item"]] = why
        status.counted = len(self._counted)

    def _receipt(self, name: str) -> Json | None:
        try:
            return self._store.read_json(f"{self._folder}/done/{name}")
        except FileNotFoundError:  # mended meanwhile
            return None


def _several(read: Callable[[str], T], names: Iterable[str], deadline: float) -> Iterator[tuple[str, T]]:
    """Read, some at a time, until it is time to end. What has been asked for is waited for."""

    def begun_in_time() -> Iterator[str]:
        for name in names:
            if time.monotonic() >= deadline:
                return
            yield name

    for name, future in in_order(read, begun_in_time(), threads=READERS, ahead=READERS):
        yield name, future.result()


def _samples(counts: Mapping[str, int]) -> int:
    return counts.get("read", 0)


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """`name: number`, what was kept first and what was not by reason."""
    first = [name for name in ("read", "kept") if name in counts]
    rest = sorted((name for name in counts if name not in first), key=lambda name: (name.count("/"), name))
    return [f"{name}: {counts[name]:,}" for name in (*first, *rest)]
