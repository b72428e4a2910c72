"""Who works at which item until when. Leases only save work that would be done twice; that nothing is published twice is the
receipts' doing, so a clock that is wrong or a worker that wakes after its deadline costs time and no more."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.stages.store import Json, StageStore, to_json
from data.storage import StorageError

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
        """Release it, and what expired before it."""
        self._end.set()
        assert self._thread
        self._thread.join()
        if not self.lost.is_set():
            for generation in range(self.generation + 1):
                self.store.delete(f"{self.folder}/{lease_name(self.item, generation)}")

    def content(self) -> bytes:
        tree = {"worker": self.worker, "attempt": self.attempt, "deadline": time.time() + self.seconds}
        return to_json({**tree, "samples": self.samples(), "parts": self.parts, "deaths": self.deaths})

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._end.wait(self.seconds / 3):
            try:
                if self.store.exists(
                    f"{self.folder}/{lease_name(self.item, self.generation + 1)}", deadline_s=self.seconds / 3
                ):
                    self.lost.set()
                    return
                self.store.replace(self.name, self.content(), deadline_s=self.seconds / 3)
                renewed = time.monotonic()
            except (StorageError, OSError):  # tried again, for as long as the lease holds
                if time.monotonic() - renewed > self.seconds:
                    self.lost.set()
                    return


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


def holder(store: StageStore, folder: str, item: str, generation: int) -> Holder | None:
    """Who holds it; None where it has just been released."""
    try:
        tree: Json = json.loads(store.read(f"{folder}/{lease_name(item, generation)}", max_bytes=1 << 16))
        counts = (int(tree.get(name, 0)) for name in ("samples", "parts", "deaths"))
        return Holder(str(tree["worker"]), str(tree["attempt"]), float(tree["deadline"]), *counts)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
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
        if current is not None and time.time() < current.deadline:
            return None
        new = generation + 1 if current is not None else generation
        if current is not None:
            num_parts = parts()
            deaths = 0 if num_parts > current.parts else current.deaths + 1
    lease = Lease(store, folder, item, new, worker, attempt, seconds, num_parts, deaths)
    return lease if store.create(lease.name, lease.content()) else None
