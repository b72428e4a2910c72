"""Which sample stands at which position of the training stream: a pure function, sought in O(1). numpy only.

Datasets are mixed in blocks with exact quotas, so the number of samples drawn from each before any position is known.
Within a dataset, epochs follow one another; each is exactly a permutation, shuffled on two levels: shards, then the
samples within windows of shards. A window is what must lie in the local cache at a time.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data import draws
from trainer.errors import UserError

T = TypeVar("T")

_SMALLEST_QUOTA = 64
"""Samples of the rarest dataset in a block; its share is then exact to 1 %."""
_BLOCKS = tuple(2**n for n in range(10, 21))


@dataclass(frozen=True, order=True)
class SampleRef:
    """A sample's address: the dataset's name in the run's config, and the row in it."""

    dataset: str
    index: int


@dataclass(frozen=True)
class MixSegment:
    """From stream position `start` on, datasets are mixed by these weights."""

    start: int
    weights: Mapping[str, float]


class Mixture:
    """The stream of samples. Every process computes it alike, from the seed and the shards' sizes alone."""

    def __init__(
        self,
        shard_sizes: Mapping[str, Sequence[int]],
        *,
        seed: int,
        window_shards: int,
        segments: Sequence[MixSegment],
    ) -> None:
        """
        Args:
            shard_sizes: samples of each shard of each dataset.
            window_shards: shards whose samples are shuffled together.
            segments: by ascending start, the first at 0.

        Raises:
            UserError: a segment names a dataset that is missing or empty, or weighs one too little to be drawn.
        """
        assert window_shards > 0
        if not segments or segments[0].start != 0:
            raise UserError("data mix: the first segment must start at position 0")
        if any(a.start >= b.start for a, b in pairwise(segments)):
            raise UserError("data mix: segments must start at ascending positions")
        self._shuffles = {
            name: _Shuffle(name, sizes, seed, window_shards) for name, sizes in sorted(shard_sizes.items())
        }
        self._starts = [segment.start for segment in segments]
        self._segments: list[_Segment] = []
        drawn = dict.fromkeys(self._shuffles, 0)
        for segment in segments:
            if self._segments:
                last = self._segments[-1]
                drawn = last.drawn_before(segment.start - last.start)
            self._segments.append(_Segment(segment, self._shuffles, seed, drawn))

    def refs(self, position: int, count: int) -> tuple[SampleRef, ...]:
        """The samples at stream positions `position` to `position + count - 1`."""
        assert position >= 0
        assert count >= 0
        return tuple(self._walk(position, position + count))

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before `position`."""
        segment = self._segments[bisect.bisect_right(self._starts, position) - 1]
        return segment.drawn_before(position - segment.start)

    def _walk(self, position: int, end: int) -> Iterator[SampleRef]:
        while position < end:
            i = bisect.bisect_right(self._starts, position) - 1
            segment = self._segments[i]
            segment_end = self._starts[i + 1] if i + 1 < len(self._starts) else end
            for name, ordinal in segment.draws(position - segment.start, min(end, segment_end) - segment.start):
                yield SampleRef(name, self._shuffles[name].index_at(ordinal))
            position = min(end, segment_end)


class _Segment:
    def __init__(
        self, segment: MixSegment, shuffles: Mapping[str, "_Shuffle"], seed: int, drawn: Mapping[str, int]
    ) -> None:
        self.start = segment.start
        self._seed = seed
        self._drawn = dict(drawn)
        """Samples of each dataset before this segment."""
        for name, weight in segment.weights.items():
            if name not in shuffles:
                raise UserError(f"data mix: no dataset {name!r}; have {', '.join(shuffles)}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"data mix: the weight of {name!r} must be finite and not negative, got {weight}")
            if weight and not shuffles[name].num_samples:
                raise UserError(f"data mix: dataset {name!r} is empty; leave it out or build it again")
        self._names = sorted(name for name, weight in segment.weights.items() if weight > 0)
        if not self._names:
            raise UserError("data mix: give at least one dataset a weight above 0")
        weights = np.array([segment.weights[name] for name in self._names], dtype=np.float64)
        weights /= weights.max()
        weights /= weights.sum()
        self.block = next((b for b in _BLOCKS if weights.min() * b >= _SMALLEST_QUOTA), 0)
        if not self.block:
            name = self._names[int(weights.argmin())]
            raise UserError(
                f"data mix: the weight of {name!r} is under {_SMALLEST_QUOTA / _BLOCKS[-1]:.0e} of the whole; "
                "raise it or leave the dataset out"
            )
        self.quotas = largest_remainder(weights, self.block)
        self._slots_of_block: _Cache[NDArray[np.int64]] = _Cache(4)

    def drawn_before(self, offset: int) -> dict[str, int]:
        """Samples of each dataset before `offset` in this segment, those before the segment included."""
        block, slot = divmod(offset, self.block)
        in_block = np.bincount(self._slots(block)[:slot], minlength=len(self._names))
        drawn = dict(self._drawn)
        for d, name in enumerate(self._names):
            drawn[name] += block * int(self.quotas[d]) + int(in_block[d])
        return drawn

    def draws(self, offset: int, end: int) -> Iterator[tuple[str, int]]:
        """(dataset, how many of it were drawn before) for each place of the segment from `offset` to `end - 1`."""
        drawn = self.drawn_before(offset)
        for place in range(offset, end):
            block, slot = divmod(place, self.block)
            name = self._names[self._slots(block)[slot]]
            yield name, drawn[name]
            drawn[name] += 1

    def _slots(self, block: int) -> NDArray[np.int64]:
        """Which dataset, as an index into names, stands in each place of a block."""

        def shuffled() -> NDArray[np.int64]:
            in_order = np.repeat(np.arange(len(self._names)), self.quotas)
            return in_order[draws.permutation(self._seed, "mix", self.start, block, length=self.block)]

        return self._slots_of_block.get(block, shuffled)


@dataclass(frozen=True)
class _Epoch:
    shards: NDArray[np.int64]
    """Shards in this epoch's order."""
    ends: NDArray[np.int64]
    """Samples up to and including each of them."""
    window_ends: NDArray[np.int64]


class _Shuffle:
    """A dataset's endless sequence of epochs."""

    def __init__(self, name: str, shard_sizes: Sequence[int], seed: int, window_shards: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        assert self._sizes.ndim == 1
        assert (self._sizes >= 0).all()
        self._first_index = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        self._seed, self._window_shards = seed, window_shards
        self._purpose_of_shards, self._purpose_of_samples = f"shards/{name}", f"samples/{name}"
        self._epochs: _Cache[_Epoch] = _Cache(2)
        self._windows: _Cache[NDArray[np.int64]] = _Cache(4)

    def index_at(self, ordinal: int) -> int:
        """Row of the dataset that is drawn as number `ordinal`, counted over all epochs."""
        epoch, k = divmod(ordinal, self.num_samples)
        order = self._epochs.get(epoch, lambda: self._order(epoch))
        window = int(np.searchsorted(order.window_ends, k, side="right"))
        indices = self._windows.get((epoch, window), lambda: self._shuffled_window(epoch, window, order))
        first = int(order.window_ends[window - 1]) if window else 0
        return int(indices[k - first])

    def _order(self, epoch: int) -> _Epoch:
        shards = draws.permutation(self._seed, self._purpose_of_shards, epoch, length=len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        last_of_window = np.arange(self._window_shards, len(shards) + self._window_shards, self._window_shards) - 1
        return _Epoch(shards, ends, ends[np.minimum(last_of_window, len(shards) - 1)])

    def _shuffled_window(self, epoch: int, window: int, order: _Epoch) -> NDArray[np.int64]:
        shards = order.shards[window * self._window_shards : (window + 1) * self._window_shards]
        indices = np.concatenate([np.arange(self._sizes[s]) + self._first_index[s] for s in shards])
        return indices[draws.permutation(self._seed, self._purpose_of_samples, epoch, window, length=len(indices))]


def largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to `total`, each within 1 of its share; ties go to the earlier one."""
    exact = shares * total
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")
    quotas[largest[: total - int(quotas.sum())]] += 1
    return quotas


class _Cache(Generic[T]):
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
