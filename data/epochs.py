"""A set of rows as an endless sequence of epochs, each a permutation, sought in O(1). numpy only.

Shuffled on two levels: shards, then the rows within windows of shards. A window is what must lie in the local cache at a
time. Arrays are by shard; none is by row, but for the classes of a dataset that is drawn by class.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data import draws

T = TypeVar("T")

_CACHED_WINDOWS = 256
"""Windows kept of a dataset that is drawn by class, beside one of each class."""


class Rows(Protocol):
    """What is drawn from, without end."""

    num_samples: int
    """In one epoch."""

    def index_at(self, ordinal: int) -> int:
        """Row of the dataset that is drawn as number `ordinal`, counted over all epochs."""


@dataclass(frozen=True)
class _Epoch:
    shards: NDArray[np.int64]
    """Shards in this epoch's order."""
    window_ends: NDArray[np.int64]
    """Samples up to and including each window."""


class Shuffle:
    """Rows of some shards that follow one another, each once an epoch."""

    def __init__(
        self,
        name: str,
        shard_sizes: Sequence[int] | NDArray[np.int64],
        seed: int,
        window_shards: int,
        *,
        first_row: int = 0,
    ) -> None:
        """
        Args:
            name: what the order is drawn from, beside the seed.
            first_row: of the first of the shards.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        assert self._sizes.ndim == 1
        assert (self._sizes >= 0).all()
        self._first_index = first_row + np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        self._seed, self._window_shards = seed, window_shards
        self._purpose_of_shards, self._purpose_of_samples = f"shards/{name}", f"samples/{name}"
        self._epochs: Cache[_Epoch] = Cache(2)
        self._windows: Cache[NDArray[np.int64]] = Cache(4)

    def index_at(self, ordinal: int) -> int:
        epoch, k = divmod(ordinal, self.num_samples)
        order = self._epochs.get(epoch, lambda: self._order(epoch))
        window = int(np.searchsorted(order.window_ends, k, side="right"))
        indices = self._windows.get((epoch, window), lambda: self._shuffled_window(epoch, window, order))
        first = int(order.window_ends[window - 1]) if window else 0
        return int(indices[k - first])

    def _order(self, epoch: int) -> _Epoch:
        shards = draws.permutation(self._seed, self._purpose_of_shards, epoch, length=len(self._sizes))
        in_window = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self._window_shards))
        return _Epoch(shards, np.cumsum(in_window))

    def _shuffled_window(self, epoch: int, window: int, order: _Epoch) -> NDArray[np.int64]:
        shards = order.shards[window * self._window_shards : (window + 1) * self._window_shards]
        indices = np.concatenate([np.arange(self._sizes[s]) + self._first_index[s] for s in shards])
        return indices[draws.permutation(self._seed, self._purpose_of_samples, epoch, window, length=len(indices))]


# -------------------------------------------------------------------------------------------------------------- classes


class ClassRows:
    """Which rows each class has: 4 bytes a row. Rows without a label belong to none."""

    def __init__(self, labels: NDArray[np.int32]) -> None:
        """`labels`: of each row; below 0 where none."""
        assert len(labels) < 2**31
        fits = len(labels) > 0 and labels.max() < np.iinfo(np.uint16).max
        # 16-bit numbers are sorted by radix, in a tenth of the time; 0 stands for none
        order = np.argsort((labels.clip(-1) + 1).astype(np.uint16) if fits else labels, kind="stable")
        self.num_unlabelled = int((labels < 0).sum())
        self.rows = order[self.num_unlabelled :].astype(np.int32)
        """By class, ascending within each."""
        changes = np.flatnonzero(np.diff(labels[self.rows])) + 1
        self._ends = np.concatenate([[0], changes, [len(self.rows)]]).astype(np.int64)
        self.labels = labels[self.rows[self._ends[:-1]]].astype(np.int64) if len(self.rows) else np.zeros(0, np.int64)
        """Of each class that has rows, ascending."""

    def within(self, first_row: int, end_row: int) -> list[tuple[int, int, int]]:
        """(label, from, to) in `rows` of each class that has any of the dataset's rows from `first_row` to before
        `end_row`."""
        found = []
        bounds = np.array([first_row, end_row], dtype=np.int32)
        for label, start, end in zip(
            self.labels.tolist(), self._ends[:-1].tolist(), self._ends[1:].tolist(), strict=True
        ):
            low, high = (start + np.searchsorted(self.rows[start:end], bounds)).tolist()
            if high > low:
                found.append((label, low, high))
        return found


class BalancedShuffle:
    """Rows of some shards, each class equally often: blocks have every class once, in an order of their own. Each class
    has its own epochs. All walk through the shards in one order, so classes of about one size share their windows."""

    def __init__(
        self,
        name: str,
        shard_sizes: Sequence[int] | NDArray[np.int64],
        classes: ClassRows,
        seed: int,
        window_shards: int,
        *,
        first_row: int = 0,
    ) -> None:
        """As `Shuffle`; `classes` are the whole dataset's."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        # int32 as the rows are: numpy would copy a class's rows to compare them with anything wider
        self._edges = np.concatenate([[first_row], first_row + np.cumsum(sizes)]).astype(np.int32)
        self._rows = classes.rows
        self._members = classes.within(first_row, first_row + int(sizes.sum()))
        self.num_samples = sum(end - start for _, start, end in self._members)
        self._seed, self._window_shards = seed, window_shards
        self._name = name
        self._blocks: Cache[NDArray[np.int64]] = Cache(4)
        self._orders: Cache[NDArray[np.int64]] = Cache(8)
        self._window_ends: Cache[NDArray[np.int64]] = Cache(len(self._members) + _CACHED_WINDOWS)
        self._windows: Cache[NDArray[np.int32]] = Cache(len(self._members) + _CACHED_WINDOWS)

    def index_at(self, ordinal: int) -> int:
        block, slot = divmod(ordinal, len(self._members))
        order = self._blocks.get(
            block, lambda: draws.permutation(self._seed, f"classes/{self._name}", block, length=len(self._members))
        )
        return self._row(int(order[slot]), block)

    def _row(self, member: int, ordinal: int) -> int:
        label, start, end = self._members[member]
        epoch, k = divmod(ordinal, end - start)
        shards = self._orders.get(
            epoch, lambda: draws.permutation(self._seed, f"shards/{self._name}", epoch, length=len(self._edges) - 1)
        )
        rows = self._rows[start:end]
        ends = self._window_ends.get((member, epoch), lambda: self._ends_of_windows(rows, shards))
        window = int(np.searchsorted(ends, k, side="right"))
        of_window = self._windows.get(
            (member, epoch, window), lambda: self._shuffled_window(rows, shards, label, epoch, window)
        )
        return int(of_window[k - (int(ends[window - 1]) if window else 0)])

    def _ends_of_windows(self, rows: NDArray[np.int32], shards: NDArray[np.int64]) -> NDArray[np.int64]:
        in_shard = np.diff(np.searchsorted(rows, self._edges))
        return np.cumsum(np.add.reduceat(in_shard[shards], np.arange(0, len(shards), self._window_shards)))

    def _shuffled_window(
        self, rows: NDArray[np.int32], shards: NDArray[np.int64], label: int, epoch: int, window: int
    ) -> NDArray[np.int32]:
        chosen = shards[window * self._window_shards : (window + 1) * self._window_shards]
        low, high = np.searchsorted(rows, self._edges[chosen]), np.searchsorted(rows, self._edges[chosen + 1])
        found = np.concatenate([rows[a:b] for a, b in zip(low, high, strict=True)])
        purpose = f"samples of classes/{self._name}"
        return found[draws.permutation(self._seed, purpose, epoch, window, label, length=len(found))]


class Cache(Generic[T]):
    """The last few values computed. Forgotten when pickled: a process computes its own."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = compute()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"_size": self._size, "_values": OrderedDict()}
