"""Which sample stands at which position of the training stream: a pure function, sought in O(1). numpy only.

Datasets are mixed in blocks with exact quotas, so the number of samples drawn from each before any position is known.
Within a dataset, epochs follow one another; each is exactly a permutation (data/epochs.py).

With aspect buckets every global batch is of one bucket. Buckets take turns by exact quotas too, and each (dataset,
bucket) has its own epochs. Batches are formed here, for the whole run, and dealt to ranks later: their number may change.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data import draws
from data.buckets import row_ranges
from data.epochs import BalancedShuffle, Cache, ClassRows, Rows, Shuffle
from data.quotas import Quotas, largest_remainder
from data.schema import Bucket
from trainer.errors import UserError

_SMALLEST_QUOTA = 64
"""Samples of the rarest dataset in a block; its share is then exact to 1 %."""
_BLOCKS = tuple(2**n for n in range(10, 21))
_SMALLEST_WINDOW = 4
"""Shards of a rare bucket that are shuffled together."""


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
    batch_size: int = 1
    """Images of a global batch; says nothing where there are no buckets."""


class Plan(ABC):
    """The stream of samples. Every process computes it alike, from the seed and the shards' sizes alone."""

    _starts: list[int]
    """Of the segments."""

    def refs(self, position: int, count: int) -> tuple[SampleRef, ...]:
        """The samples at stream positions `position` to `position + count - 1`."""
        assert position >= 0
        assert count >= 0
        return tuple(self._walk(position, position + count))

    def _walk(self, position: int, end: int) -> Iterator[SampleRef]:
        while position < end:
            i = self._segment_at(position)
            segment_end = min(end, self._starts[i + 1]) if i + 1 < len(self._starts) else end
            yield from self._refs_of(i, position - self._starts[i], segment_end - self._starts[i])
            position = segment_end

    def _segment_at(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    @abstractmethod
    def _refs_of(self, segment: int, offset: int, end: int) -> Iterator[SampleRef]:
        """Those from `offset` to `end - 1` of a segment."""

    @abstractmethod
    def bucket_at(self, position: int) -> str | None:
        """The bucket that the batch at a position is of; None where there are no buckets."""


class Mixture(Plan):
    """Datasets mixed sample by sample, whatever the images' shapes."""

    def __init__(
        self,
        shard_sizes: Mapping[str, Sequence[int]],
        *,
        seed: int,
        window_shards: int,
        segments: Sequence[MixSegment],
        classes: Mapping[str, ClassRows] | None = None,
    ) -> None:
        """
        Args:
            shard_sizes: samples of each shard of each dataset.
            window_shards: shards whose samples are shuffled together.
            segments: by ascending start, the first at 0.
            classes: of the datasets that are drawn by class, each class equally often.

        Raises:
            UserError: a segment names a dataset that is missing or empty, or weighs one too little to be drawn.
        """
        assert window_shards > 0
        _check_segments(segments, shard_sizes)
        self._rows: dict[str, Rows] = {
            name: _rows(name, sizes, (classes or {}).get(name), seed, window_shards)
            for name, sizes in sorted(shard_sizes.items())
        }
        self._starts = [segment.start for segment in segments]
        self._segments: list[_Segment] = []
        drawn = dict.fromkeys(self._rows, 0)
        for segment in segments:
            if self._segments:
                last = self._segments[-1]
                drawn = last.drawn_before(segment.start - last.start)
            self._segments.append(_Segment(segment, self._rows, seed, drawn))

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before `position`."""
        segment = self._segments[self._segment_at(position)]
        return segment.drawn_before(position - segment.start)

    def bucket_at(self, position: int) -> None:
        return None

    def _refs_of(self, segment: int, offset: int, end: int) -> Iterator[SampleRef]:
        for name, ordinal in self._segments[segment].draws(offset, end):
            yield SampleRef(name, self._rows[name].index_at(ordinal))


class _Segment:
    def __init__(self, segment: MixSegment, rows: Mapping[str, Rows], seed: int, drawn: Mapping[str, int]) -> None:
        self.start = segment.start
        self._seed = seed
        self._drawn = dict(drawn)
        """Samples of each dataset before this segment."""
        for name, weight in segment.weights.items():
            if weight and not rows[name].num_samples:
                raise UserError(f"data mix: dataset {name!r} is empty; leave it out or build it again")
        self._names = sorted(name for name, weight in segment.weights.items() if weight > 0)
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
        self._slots_of_block: Cache[NDArray[np.int64]] = Cache(4)

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


# -------------------------------------------------------------------------------------------------------------- buckets


class BucketedMixture(Plan):
    """Datasets mixed batch by batch: each batch is of one bucket, and in it the datasets that have the bucket."""

    def __init__(
        self,
        shard_sizes: Mapping[str, Sequence[int]],
        buckets: Mapping[str, Sequence[Bucket]],
        *,
        seed: int,
        window_shards: int,
        segments: Sequence[MixSegment],
        classes: Mapping[str, ClassRows] | None = None,
    ) -> None:
        """As `Mixture`. A window of all of a dataset's buckets together has about `window_shards` shards.

        Args:
            buckets: of each dataset. Those of one name are mixed.
        """
        assert window_shards > 0
        _check_segments(segments, shard_sizes)
        self._rows: dict[tuple[str, str], Rows] = {}
        for name in sorted(shard_sizes):
            sizes = np.asarray(shard_sizes[name], dtype=np.int64)
            first_rows = row_ranges(sizes, buckets[name])
            for bucket in buckets[name]:
                own = sizes[bucket.first_shard : bucket.first_shard + bucket.num_shards]
                window = max(_SMALLEST_WINDOW, round(window_shards * len(own) / len(sizes)))
                rows = _rows(
                    f"{name}/{bucket.name}", own, (classes or {}).get(name), seed, min(window, window_shards),
                    first_row=first_rows[bucket.name][0],
                )  # fmt: skip
                if rows.num_samples:
                    self._rows[name, bucket.name] = rows
        self._starts = [segment.start for segment in segments]
        self._segments: list[_BucketedSegment] = []
        drawn = dict.fromkeys(self._rows, 0)
        for segment in segments:
            if self._segments:
                last = self._segments[-1]
                drawn = last.drawn_before(segment.start - last.start)
            self._segments.append(_BucketedSegment(segment, self._rows, seed, drawn))

    def drawn_before(self, position: int) -> dict[tuple[str, str], int]:
        """How many samples of each (dataset, bucket) stand before `position`."""
        segment = self._segments[self._segment_at(position)]
        return segment.drawn_before(position - segment.start)

    def bucket_at(self, position: int) -> str:
        segment = self._segments[self._segment_at(position)]
        return segment.bucket_of(position - segment.start)

    def _refs_of(self, segment: int, offset: int, end: int) -> Iterator[SampleRef]:
        for source, ordinal in self._segments[segment].draws(offset, end):
            yield SampleRef(source[0], self._rows[source].index_at(ordinal))


class _BucketedSegment:
    """Batches take buckets by quotas. A bucket's batches, put together, are one row of samples, which its datasets take
    by quotas."""

    def __init__(
        self,
        segment: MixSegment,
        rows: Mapping[tuple[str, str], Rows],
        seed: int,
        drawn: Mapping[tuple[str, str], int],
    ) -> None:
        self.start, self._batch_size = segment.start, segment.batch_size
        self._drawn = dict(drawn)
        """Samples of each (dataset, bucket) before this segment."""
        totals = {name: sum(r.num_samples for (n, _), r in rows.items() if n == name) for name in segment.weights}
        shares: dict[str, dict[str, float]] = {}
        for (name, bucket), of_bucket in rows.items():
            if weight := segment.weights.get(name, 0.0):
                shares.setdefault(bucket, {})[name] = weight * of_bucket.num_samples / totals[name]
        for name, weight in segment.weights.items():
            if weight and not totals[name]:
                raise UserError(f"data mix: dataset {name!r} is empty; leave it out or build it again")
        self._buckets = sorted(shares)
        self._order = Quotas(
            [sum(shares[bucket].values()) for bucket in self._buckets],
            seed=seed,
            purpose="buckets",
            coordinate=self.start,
        )
        self._sources = [[(name, bucket) for name in sorted(shares[bucket])] for bucket in self._buckets]
        self._mixes = [
            Quotas([shares[b][name] for name, _ in sources], seed=seed, purpose=f"mix/{b}", coordinate=self.start)
            for b, sources in zip(self._buckets, self._sources, strict=True)
        ]

    def bucket_of(self, offset: int) -> str:
        batch = offset // self._batch_size
        return next(self._buckets[which] for which, _ in self._order.walk(batch, batch + 1))

    def drawn_before(self, offset: int) -> dict[tuple[str, str], int]:
        """Samples of each (dataset, bucket) before `offset` in this segment, those before the segment included."""
        batch, rest = divmod(offset, self._batch_size)
        batches = self._order.counts(batch).tolist()
        [(current, _)] = self._order.walk(batch, batch + 1)
        drawn = dict(self._drawn)
        for which, (sources, mix) in enumerate(zip(self._sources, self._mixes, strict=True)):
            samples = batches[which] * self._batch_size + (rest if which == current else 0)
            for source, count in zip(sources, mix.counts(samples).tolist(), strict=True):
                drawn[source] += count
        return drawn

    def draws(self, offset: int, end: int) -> Iterator[tuple[tuple[str, str], int]]:
        """((dataset, bucket), how many of it were drawn before) for each place from `offset` to `end - 1`."""
        first, size = offset // self._batch_size, self._batch_size
        for batch, (which, before) in enumerate(self._order.walk(first, -(-end // size)), start=first):
            sources = self._sources[which]
            begin, stop = max(offset - batch * size, 0), min(end - batch * size, size)
            for source, count in self._mixes[which].walk(before * size + begin, before * size + stop):
                yield sources[source], self._drawn[sources[source]] + count


# ----------------------------------------------------------------------------------------------------------- what is given


def _check_segments(segments: Sequence[MixSegment], names: Mapping[str, object]) -> None:
    if not segments or segments[0].start != 0:
        raise UserError("data mix: the first segment must start at position 0")
    if any(a.start >= b.start for a, b in pairwise(segments)):
        raise UserError("data mix: segments must start at ascending positions")
    for segment in segments:
        for name, weight in segment.weights.items():
            if name not in names:
                raise UserError(f"data mix: no dataset {name!r}; have {', '.join(sorted(names))}")
            if not 0 <= weight < float("inf"):
                raise UserError(f"data mix: the weight of {name!r} must be finite and not negative, got {weight}")
        if not any(segment.weights.values()):
            raise UserError("data mix: give at least one dataset a weight above 0")


def _rows(
    name: str,
    shard_sizes: Sequence[int] | NDArray[np.int64],
    classes: ClassRows | None,
    seed: int,
    window_shards: int,
    *,
    first_row: int = 0,
) -> Rows:
    if classes is None:
        return Shuffle(name, shard_sizes, seed, window_shards, first_row=first_row)
    return BalancedShuffle(name, shard_sizes, classes, seed, window_shards, first_row=first_row)
