"""Who works at which item until when. Leases only save work that would be done twice; that nothing is published twice is the
receipts' doing, so a clock that is wrong or a worker that wakes after its deadline costs time and no more."""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.stages.store import Json, StageStore, to_json
from data.storage import DEADLINE_S, StorageError
from trainer.errors import UserError, one_line

MAX_DEATHS = 20
"""Of workers at one item without a new part in between: so would the next die."""


@dataclass(frozen=True)
class Holder:
    """What a lease says."""

    worker: str
    attempt: str
    deadline: float
    """Unix time."""
    samples: int = 0
    """Done of the item so far."""
    parts: int = 0
    """That the item had when it was taken."""
    deaths: int = 0
    """Of workers before this one, since the item had fewer parts."""


@dataclass
class Lease:
    """An item's, held and renewed by a thread of its own until released."""

    store: StageStore
    folder: str
    item: str
    generation: int
    worker: str
    attempt: str
    seconds: float
    parts: int = 0
    deaths: int = 0
    samples: Callable[[], int] = lambda: 0
    lost: threading.Event = field(default_factory=threading.Event)
    """Another worker has taken over, or renewals have failed for longer than the lease."""
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return f"{self.folder}/{lease_name(self.item, self.generation)}"

    def __enter__(self) -> "Lease":
        self._thread = threading.Thread(target=self._renew, name=f"lease of {self.item}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release it, and what expired before it. Where storage fails it is left to expire: what was done under it is done."""
        self._end.set()
        assert self._thread
        self._thread.join()
        deadline = time.monotonic() + self.seconds
        try:
            if not self.lost.is_set() and self._is_ours(deadline):
                for generation in range(self.generation + 1):
                    name = f"{self.folder}/{lease_name(self.item, generation)}"
                    self.store.delete(name, deadline_s=_left_s(deadline))
        except (StorageError, UserError) as e:
            logging.warning("lease of %s: not released, so it expires by itself: %s", self.item, one_line(e))

    def _is_ours(self, deadline: float) -> bool:
        """Whether it is still there and says so: another may have taken over and released, and a third begun anew."""
        current = holder(self.store, self.folder, self.item, self.generation, deadline_s=_left_s(deadline))
        return current is not None and current.attempt == self.attempt

    def content(self) -> bytes:
        tree = {"worker": self.worker, "attempt": self.attempt, "deadline": time.time() + self.seconds}
        return to_json({**tree, "samples": self.samples(), "parts": self.parts, "deaths": self.deaths})

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._end.wait(self.seconds / 3):
            began = time.monotonic()
            # For all requests of a renewal together, so that there is time for a second one before the lease ends.
            deadline = began + self.seconds / 3
            try:
                next_one = f"{self.folder}/{lease_name(self.item, self.generation + 1)}"
                # What is no longer ours must not be written: it would take the item from whoever has it now.
                if self.store.exists(next_one, deadline_s=_left_s(deadline)) or not self._is_ours(deadline):
                    self._lose("another has taken over")
                    return
                self.store.replace(self.name, self.content(), deadline_s=_left_s(deadline))
                renewed = began
            except Exception as e:  # of whatever kind, also access denied: tried again, for as long as the lease holds
                if time.monotonic() - renewed >= self.seconds:
                    self._lose(f"not renewed for {self.seconds:.0f} s: {one_line(e)}")
                    return

    def _lose(self, why: str) -> None:
        logging.warning("lease of %s: lost, %s; what it published stays, the rest is done anew", self.item, why)
        self.lost.set()


def _left_s(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def lease_name(item: str, generation: int) -> str:
    return f"{item}.{generation:04d}"


def held(names: Sequence[str]) -> dict[str, int]:
    """Item to the newest generation of its leases, from the names of a lease folder."""
    newest: dict[str, int] = {}
    for name in names:
        item, _, generation = name.rpartition(".")
        if item and generation.isdigit():
            newest[item] = max(newest.get(item, -1), int(generation))
    return newest


def holder(
    store: StageStore, folder: str, item: str, generation: int, *, deadline_s: float = DEADLINE_S
) -> Holder | None:
    """Who holds it; None where it has just been released. One that is no lease has expired.

    Raises:
        UserError: access is denied.
        StorageError: storage fails for longer than the deadline; it may well be held.
    """
    try:
        data = store.read(f"{folder}/{lease_name(item, generation)}", max_bytes=1 << 16, deadline_s=deadline_s)
    except FileNotFoundError:
        return None
    try:
        tree: Json = json.loads(data)
        counts = (int(tree.get(name, 0)) for name in ("samples", "parts", "deaths"))
        return Holder(str(tree["worker"]), str(tree["attempt"]), float(tree["deadline"]), *counts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Holder("?", "?", 0.0)


def take(
    store: StageStore,
    folder: str,
    item: str,
    generation: int | None,
    *,
    worker: str,
    attempt: str,
    seconds: float,
    parts: Callable[[], int],
) -> Lease | None:
    """The item's lease, if nobody holds it.

    Args:
        generation: newest lease of the item, as listed; None: there is none.
        parts: how many parts the item has; asked where a lease is taken over.
    """
    new = num_parts = deaths = 0
    if generation is not None:
        current = holder(store, folder, item, generation)
        if current is None:  # released since it was listed: the item is whole, or another begins with generation 0
            return None
        if time.time() < current.deadline:
            return None
        new, num_parts = generation + 1, parts()
        deaths = 0 if num_parts > current.parts else current.deaths + 1
    lease = Lease(store, folder, item, new, worker, attempt, seconds, num_parts, deaths)
    return lease if store.create(lease.name, lease.content()) else None
