"""The plan as a whole: whatever the buckets, the mix and the classes, every epoch is a permutation, batches are of one
bucket, and stops and other numbers of ranks change nothing."""

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.batches import BatchRequest
from data.buckets import ASPECTS, row_ranges
from data.epochs import ClassRows
from data.plan import BucketedMixture, MixSegment, Mixture, Plan, SampleRef
from data.quotas import Quotas
from data.schema import Bucket
from tests.tiny import tiny
from trainer.config import DatasetConfig, RunConfig
from trainer.config import replace as changed
from trainer.errors import UserError
from trainer.requests import RankRequests
from trainer.step_plan import StepPlanner

NAMES = ("1:1", "4:3", "3:4", "2:1")


@dataclass(frozen=True)
class Set:
    """A dataset as the plan sees it."""

    sizes: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    labels: tuple[int, ...] | None
    """Of each row, where it is drawn by class."""

    @property
    def classes(self) -> ClassRows | None:
        return None if self.labels is None else ClassRows(np.array(self.labels, dtype=np.int32))


@st.composite
def sets(draw: st.DrawFn) -> Set:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    sizes: list[int] = []
    buckets = []
    for name in names:
        own = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
        buckets.append(Bucket(name=name, aspect=ASPECTS[name], first_shard=len(sizes), num_shards=len(own)))
        sizes += own
    labels = None
    if draw(st.booleans()):
        labels = tuple(draw(st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes))))
    return Set(tuple(sizes), tuple(buckets), labels)


mixes = st.lists(sets(), min_size=1, max_size=3).map(lambda found: dict(zip("abc", found, strict=False)))
weights = st.floats(0.05, 20.0)


def planned(
    mix: dict[str, Set], segments: Sequence[MixSegment], seed: int = 0, window: int = 2, bucketed: bool = True
) -> Plan:
    sizes = {name: s.sizes for name, s in mix.items()}
    classes = {name: s.classes for name, s in mix.items() if s.classes is not None}
    if not bucketed:
        return Mixture(sizes, seed=seed, window_shards=window, segments=segments, classes=classes)
    buckets = {name: s.buckets for name, s in mix.items()}
    return BucketedMixture(sizes, buckets, seed=seed, window_shards=window, segments=segments, classes=classes)


def bucket_of(mix: dict[str, Set], ref: SampleRef) -> str:
    ranges = row_ranges(mix[ref.dataset].sizes, mix[ref.dataset].buckets)
    return next(name for name, (first, end) in ranges.items() if first <= ref.index < end)


def check_epochs(rows: list[int], members: set[int]) -> None:
    """Each epoch of what was drawn has every member once, the last one none twice."""
    for first in range(0, len(rows), len(members)):
        epoch = rows[first : first + len(members)]
        assert set(epoch) <= members
        assert len(set(epoch)) == len(epoch)


def check_drawn(rows: list[int], members: range, labels: tuple[int, ...] | None) -> None:
    if labels is None:
        check_epochs(rows, set(members))
        return
    of_class = {c: {r for r in members if labels[r] == c} for c in {labels[r] for r in members}}
    for first in range(0, len(rows), len(of_class)):  # blocks with every class once
        block = [labels[row] for row in rows[first : first + len(of_class)]]
        assert len(set(block)) == len(block)
    for c, own in of_class.items():
        check_epochs([row for row in rows if labels[row] == c], own)


@settings(max_examples=40, deadline=None)
@given(mixes, st.data(), st.integers(0, 2**40), st.integers(1, 4))
def test_nothing_is_lost_or_repeated_and_batches_are_of_one_bucket(
    mix: dict[str, Set], data: st.DataObject, seed: int, window: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    batches = data.draw(st.lists(st.integers(1, 40), min_size=len(sizes), max_size=len(sizes)))
    segments, start = [], 0
    for size, count in zip(sizes, batches, strict=True):
        segments.append(MixSegment(start, {name: data.draw(weights) for name in mix}, size))
        start += size * count
    plan = planned(mix, segments, seed, window)
    refs = plan.refs(0, start)
    position = 0
    for size, count in zip(sizes, batches, strict=True):
        for _ in range(count):
            assert {bucket_of(mix, ref) for ref in refs[position : position + size]} == {plan.bucket_at(position)}
            position += size
    for name, s in mix.items():
        for first, end in row_ranges(s.sizes, s.buckets).values():
            drawn = [ref.index for ref in refs if ref.dataset == name and first <= ref.index < end]
            check_drawn(drawn, range(first, end), s.labels)
    assert isinstance(plan, BucketedMixture)
    cut = data.draw(st.integers(0, start))
    counted = Counter((ref.dataset, bucket_of(mix, ref)) for ref in refs[:cut])
    assert {source: count for source, count in plan.drawn_before(cut).items() if count} == dict(counted)
    assert planned(mix, segments, seed, window).refs(cut, start - cut) == refs[cut:]


@settings(max_examples=40, deadline=None)
@given(mixes, st.integers(0, 2**40), st.integers(1, 4), weights)
def test_without_buckets_nothing_is_lost_or_repeated_either(
    mix: dict[str, Set], seed: int, window: int, weight: float
) -> None:
    segments = [MixSegment(0, dict.fromkeys(mix, 1.0)), MixSegment(100, {**dict.fromkeys(mix, 1.0), "a": weight})]
    refs = planned(mix, segments, seed, window, bucketed=False).refs(0, 300)
    for name, s in mix.items():
        check_drawn([ref.index for ref in refs if ref.dataset == name], range(sum(s.sizes)), s.labels)


# ----------------------------------------------------------------------------------------------------- stops and ranks


BASE = tiny("data.num_workers=0")


def configured(mix: dict[str, Set], batch_sizes: Sequence[int], steps: Sequence[int], seed: int) -> RunConfig:
    phases = [
        changed(BASE.phases[0], name=f"p{i}", steps=count, batch_size=size)
        for i, (size, count) in enumerate(zip(batch_sizes, steps, strict=True))
    ]
    for i in range(1, len(phases)):  # each phase weighs them otherwise
        phases[i] = changed(phases[i], data_mix={name: 1.0 + ((i + j) % 3) for j, name in enumerate(mix)})
    datasets = {name: DatasetConfig(url=name, class_balanced=s.labels is not None) for name, s in mix.items()}
    return changed(BASE, seed=seed, phases=phases, data=changed(BASE.data, datasets=datasets, buckets=True))


def dealt(planner: StepPlanner, step: int, world_size: int) -> list[BatchRequest]:
    """What all ranks ask for."""
    return [RankRequests(planner, rank, world_size)(step) for rank in range(world_size)]


@settings(max_examples=30, deadline=None)
@given(mixes, st.data(), st.integers(0, 2**40))
def test_stops_and_numbers_of_ranks_change_no_global_batch(mix: dict[str, Set], data: st.DataObject, seed: int) -> None:
    batch_sizes = data.draw(st.lists(st.sampled_from([4, 6, 8, 12]), min_size=1, max_size=3))
    steps = data.draw(st.lists(st.integers(1, 8), min_size=len(batch_sizes), max_size=len(batch_sizes)))
    config = configured(mix, batch_sizes, steps, seed)
    sizes, classes = {n: s.sizes for n, s in mix.items()}, {n: s.classes for n, s in mix.items() if s.classes}
    buckets = {name: s.buckets for name, s in mix.items()}

    undisturbed = StepPlanner(config, sizes, buckets=buckets, classes=classes)

    def planner() -> StepPlanner:
        if data.draw(st.booleans()):  # one that was handed over, as a worker's is
            return pickle.loads(pickle.dumps(undisturbed))  # type: ignore[no-any-return]  # noqa: S301
        return StepPlanner(config, sizes, buckets=buckets, classes=classes)

    global_batches = [dealt(undisturbed, step, 1)[0] for step in range(sum(steps))]
    step = 0
    while step < sum(steps):  # each round is an attempt: another number of ranks, a new plan, some steps
        fresh, attempt_end = planner(), step + data.draw(st.integers(1, 5))
        world = data.draw(st.integers(1, 12))
        while step < min(attempt_end, sum(steps)):
            size = fresh.plan(step).phase.batch_size
            ranks = world if size % world == 0 else 1
            parts = dealt(fresh, step, ranks)
            assert tuple(ref for part in parts for ref in part.refs) == global_batches[step].refs
            assert [part.first_position for part in parts] == [
                global_batches[step].first_position + rank * (size // ranks) for rank in range(ranks)
            ]
            assert {part.shape for part in parts} == {global_batches[step].shape}
            step += 1
    height, width = global_batches[0].shape or (0, 0)
    assert height * width <= BASE.phases[0].resolution ** 2


@settings(max_examples=25, deadline=None)
@given(mixes, st.integers(0, 9), st.integers(1, 4))
def test_a_roll_back_passes_over_whole_batches(mix: dict[str, Set], step: int, passed: int) -> None:
    config = configured(mix, [4, 6], [6, 8], seed=3)
    buckets = {name: s.buckets for name, s in mix.items()}
    before = StepPlanner(config, {n: s.sizes for n, s in mix.items()}, buckets=buckets)
    size = before.plan(step).phase.batch_size
    after = before.passing_over([(step, passed * size)])
    for i in range(14):
        requests = [dealt(planner, i, 1)[0] for planner in (before, after)]
        if i < step:
            assert requests[0].refs == requests[1].refs
        assert len({bucket_of(mix, ref) for ref in requests[1].refs}) == 1
    last = before.schedule.at(step).phase_index
    end = 6 if last == 0 else 14
    for i in range(step, end - passed):  # within the phase the images come that would have come so many steps later
        assert dealt(after, i, 1)[0].refs == dealt(before, i + passed, 1)[0].refs


# --------------------------------------------------------------------------------------------------------------- quotas


@settings(deadline=None)
@given(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=9), st.integers(0, 10**9), st.integers(1, 300))
def test_quotas_count_what_they_walk(shares: list[float], place: int, count: int) -> None:
    quotas = Quotas(shares, seed=4, purpose="p", coordinate=7)
    before, after = quotas.counts(place), quotas.counts(place + count)
    assert before.sum() == place
    seen = before.copy()
    for who, counted in quotas.walk(place, place + count):
        assert counted == seen[who]
        seen[who] += 1
    assert (seen == after).all()


@settings(deadline=None)
@given(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=9), st.lists(st.integers(0, 10**10), min_size=2, max_size=6))
def test_quotas_never_drift(shares: list[float], places: list[int]) -> None:
    """Within a block of the share, far out too; and counts never fall."""
    quotas = Quotas(shares, seed=1, purpose="p", coordinate=0)
    exact = np.array(shares) / sum(shares)
    counts = [quotas.counts(place) for place in sorted(places)]
    assert all((later >= earlier).all() for earlier, later in pairwise(counts))
    for place, found in zip(sorted(places), counts, strict=True):
        assert np.abs(found - exact * place).max() <= 2 + 1024 + 1e-5 * place * exact.max()
        whole = place // 1024 * 1024
        frequent = exact * 1024 >= 1
        if frequent.all():  # at a block's end to within one
            assert np.abs(quotas.counts(whole) - exact * whole).max() <= 1 + 1e-6


def test_the_rare_come_at_even_distances() -> None:
    quotas = Quotas([1.0, 1e-4], seed=0, purpose="p", coordinate=0)
    places = [i for i, (who, _) in enumerate(quotas.walk(0, 60_000)) if who == 1]
    assert {b - a for a, b in pairwise(places)} <= {10_000, 10_001, 10_002}
    assert len(places) in (5, 6)


# -------------------------------------------------------------------------------------------------------------- classes


def test_each_class_is_drawn_equally_often_and_shares_windows() -> None:
    labels = np.repeat(np.arange(5, dtype=np.int32), [400, 100, 100, 100, 100])[
        np.random.default_rng(0).permutation(800)
    ]
    mixture = Mixture(
        {"a": [20] * 40},
        seed=0,
        window_shards=4,
        segments=[MixSegment(0, {"a": 1.0})],
        classes={"a": ClassRows(labels)},
    )
    refs = mixture.refs(0, 1000)
    assert Counter(labels[ref.index] for ref in refs) == dict.fromkeys(range(5), 200)
    shards_of_first = {ref.index // 20 for ref in refs[:40] if labels[ref.index]}
    assert len(shards_of_first) <= 12  # the four small classes walk through the same windows of 4 shards


def test_rows_without_a_label_are_never_drawn() -> None:
    labels = np.array([0, -1, 1, -1, 0, 1, 1], dtype=np.int32)
    rows = ClassRows(labels)
    assert (rows.num_unlabelled, rows.labels.tolist(), rows.rows.tolist()) == (2, [0, 1], [0, 4, 2, 5, 6])
    mixture = Mixture({"a": [3, 4]}, seed=0, window_shards=1, segments=[MixSegment(0, {"a": 1.0})], classes={"a": rows})
    assert {ref.index for ref in mixture.refs(0, 50)} == {0, 2, 4, 5, 6}


@pytest.mark.parametrize("largest", [5, 65_534, 65_535, 70_000, 2**31 - 1])
def test_rows_of_classes_however_large_their_numbers(largest: int) -> None:
    labels = np.array([largest, 0, largest - 1, -1, 3, -7, largest, 0], dtype=np.int32)
    rows = ClassRows(labels)
    assert rows.num_unlabelled == 2
    assert rows.labels.tolist() == [0, 3, largest - 1, largest]
    assert rows.rows.tolist() == [1, 7, 4, 2, 0, 6]
    assert rows.within(1, 7) == [(0, 0, 1), (3, 2, 3), (largest - 1, 3, 4), (largest, 5, 6)]


def test_a_dataset_of_empty_buckets_alone_is_refused() -> None:
    empty = Set((0, 0), (Bucket(name="1:1", aspect=1.0, first_shard=0, num_shards=2),), None)
    full = replace(empty, sizes=(3, 0))
    with pytest.raises(UserError, match="'a' is empty"):
        planned({"a": empty, "b": full}, [MixSegment(0, {"a": 1.0, "b": 1.0}, 4)])
    assert len(planned({"a": empty, "b": full}, [MixSegment(0, {"b": 1.0}, 4)]).refs(0, 9)) == 9


def test_buckets_come_by_the_weighted_share_of_their_images() -> None:
    mix = {
        "a": Set((30, 10), (_bucket("1:1", 0), _bucket("4:3", 1)), None),
        "b": Set((5, 15), (_bucket("1:1", 0), _bucket("2:1", 1)), None),
    }
    plan = planned(mix, [MixSegment(0, {"a": 3.0, "b": 1.0}, 2)])
    batches = 16 * 100
    found = Counter(plan.bucket_at(2 * batch) for batch in range(batches))
    shares = {"1:1": 0.75 * 0.75 + 0.25 * 0.25, "4:3": 0.75 * 0.25, "2:1": 0.25 * 0.75}
    for name, share in shares.items():
        assert found[name] == pytest.approx(batches * share, abs=1), name
    drawn = Counter(ref.dataset for ref in plan.refs(0, 2 * batches))
    assert drawn["a"] == pytest.approx(0.75 * 2 * batches, abs=4)


def _bucket(name: str, shard: int) -> Bucket:
    return Bucket(name=name, aspect=ASPECTS[name], first_shard=shard, num_shards=1)


def test_the_bucketed_stream_is_fixed() -> None:
    """A checkpoint's position means these samples, in this version and the next."""
    labels: NDArray[np.int32] = np.arange(12, dtype=np.int32) % 3
    mix = {
        "a": Set((4, 4, 4, 4), tuple(replace_shards(_bucket(n, 2 * i), 2) for i, n in enumerate(("1:1", "4:3"))), None),
        "b": Set((6, 6), (_bucket("1:1", 0), _bucket("2:1", 1)), tuple(labels.tolist())),
    }
    plan = planned(mix, [MixSegment(0, {"a": 2.0, "b": 1.0}, 3), MixSegment(300, {"a": 1.0, "b": 2.0}, 3)], seed=7)
    assert [plan.bucket_at(3 * batch) for batch in range(98, 106)] == FIXED_BUCKETS
    assert [(ref.dataset, ref.index) for ref in plan.refs(294, 12)] == FIXED_REFS


def replace_shards(bucket: Bucket, num_shards: int) -> Bucket:
    return bucket.model_copy(update={"num_shards": num_shards})


FIXED_BUCKETS = ["2:1", "4:3", "2:1", "4:3", "1:1", "1:1", "1:1", "2:1"]
FIXED_REFS = [
    ("b", 7), ("b", 8), ("b", 9), ("a", 9), ("a", 10), ("a", 13),
    ("b", 10), ("b", 11), ("b", 6), ("a", 12), ("a", 11), ("a", 15),
]  # fmt: skip
