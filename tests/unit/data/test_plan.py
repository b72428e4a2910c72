"""The plan: epochs are permutations, mixing is exact, seeking needs nothing from before."""

import pickle
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import draws
from data.plan import MixSegment, Mixture, SampleRef, largest_remainder
from trainer.errors import UserError

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def one(sizes: list[int], seed: int = 0, window_shards: int = 3) -> Mixture:
    return Mixture({"a": sizes}, seed=seed, window_shards=window_shards, segments=[MixSegment(0, {"a": 1.0})])


def two(seed: int = 0) -> Mixture:
    return Mixture(
        {"a": [50, 7, 0, 30], "b": [11] * 9, "c": [5]},
        seed=seed,
        window_shards=2,
        segments=[
            MixSegment(0, {"a": 1.0}),
            MixSegment(700, {"a": 3.0, "b": 1.0}),
            MixSegment(2500, {"b": 0.2, "c": 0.3, "a": 0.0}),
        ],
    )


@settings(deadline=None)
@given(shard_sizes, st.integers(0, 2**40), st.integers(1, 15), st.integers(0, 50))
def test_each_epoch_is_a_permutation(sizes: list[int], seed: int, window_shards: int, epoch: int) -> None:
    total = sum(sizes)
    refs = one(sizes, seed, window_shards).refs(epoch * total, total)
    assert sorted(ref.index for ref in refs) == list(range(total))


@settings(deadline=None)
@given(st.integers(0, 6000), st.lists(st.integers(0, 400), min_size=1, max_size=5))
def test_refs_do_not_depend_on_how_they_are_asked_for(position: int, counts: list[int]) -> None:
    parts: list[SampleRef] = []
    for count in counts:
        parts += two().refs(position + len(parts), count)
    assert tuple(parts) == two().refs(position, sum(counts))


def test_mixing_counts_are_exact() -> None:
    refs = two().refs(0, 2500 + 1024 * 3)
    assert Counter(ref.dataset for ref in refs[:700]) == {"a": 700}
    assert Counter(ref.dataset for ref in refs[700:1724]) == {"a": 768, "b": 256}
    for block in range(3):
        start = 2500 + 1024 * block
        assert Counter(ref.dataset for ref in refs[start : start + 1024]) == {"b": 410, "c": 614}


def test_each_dataset_continues_its_own_epochs_across_segments() -> None:
    refs = two().refs(0, 5000)
    for name, total in (("a", 87), ("b", 99), ("c", 5)):
        drawn = [ref.index for ref in refs if ref.dataset == name]
        for first in range(0, len(drawn) - total + 1, total):
            assert sorted(drawn[first : first + total]) == list(range(total)), name


@settings(deadline=None)
@given(st.integers(0, 6000))
def test_drawn_before_counts_what_refs_gives(position: int) -> None:
    counted = Counter(ref.dataset for ref in two().refs(0, position))
    assert two().drawn_before(position) == {name: counted[name] for name in "abc"}


def test_epochs_and_seeds_differ_and_pickling_does_not() -> None:
    plan = one([20, 20, 20])
    assert plan.refs(0, 60) != plan.refs(60, 60)
    assert plan.refs(0, 60) != one([20, 20, 20], seed=1).refs(0, 60)
    assert pickle.loads(pickle.dumps(plan)).refs(30, 60) == plan.refs(30, 60)  # noqa: S301
    assert len(pickle.dumps(plan)) < 2000


def test_samples_of_a_window_lie_together() -> None:
    """The first window's samples come from `window_shards` shards: the cache need not hold more."""
    refs = one([10] * 20, window_shards=4).refs(0, 40)
    assert len({ref.index // 10 for ref in refs}) == 4


@pytest.mark.parametrize("distinct", [3, 50, 2**40])
def test_a_permutation_is_the_stable_order_of_its_numbers(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal numbers too, which do not come in practice: numpy's sorts must not decide between them."""
    numbers = np.random.default_rng(0).integers(0, distinct, 1000).astype(np.uint64)
    monkeypatch.setattr(draws, "raw", lambda *arguments, count: numbers[:count])
    expected = sorted(range(1000), key=lambda i: (int(numbers[i]), i))
    assert draws.permutation(0, "x", length=1000).tolist() == expected


def test_the_stream_is_fixed() -> None:
    """A checkpoint's position means these samples, in this version and the next."""
    assert [ref.index for ref in one([4, 4, 4, 4], seed=7, window_shards=2).refs(5, 6)] == [7, 3, 2, 10, 12, 15]
    assert "".join(ref.dataset for ref in two(seed=7).refs(2500, 24)) == "bcccbccbbcccbcccbbcbccbc"


def test_sought_in_the_middle_of_500_million_samples(record_property: Callable[[str, object], None]) -> None:
    import time
    import tracemalloc

    sizes = np.full(50_000, 10_000)
    plan = Mixture({"a": sizes}, seed=0, window_shards=64, segments=[MixSegment(0, {"a": 1.0})])  # type: ignore[dict-item]
    tracemalloc.start()
    began = time.perf_counter()
    refs = plan.refs(250_000_000, 64)
    record_property("seek_s", time.perf_counter() - began)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(refs)) == 64
    assert peak < 100e6  # a plan of the whole epoch would be 4 GB


def test_a_rare_dataset_is_drawn_in_its_share() -> None:
    plan = Mixture(
        {"a": [10], "rare": [10]}, seed=0, window_shards=1, segments=[MixSegment(0, {"a": 999.0, "rare": 1.0})]
    )
    assert plan.drawn_before(2**20)["rare"] == pytest.approx(2**20 / 1000, rel=0.01)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "position 0"),
        ([MixSegment(5, {"a": 1})], "position 0"),
        ([MixSegment(0, {"a": 1}), MixSegment(0, {"a": 1})], "ascending"),
        ([MixSegment(0, {"x": 1})], "no dataset 'x'"),
        ([MixSegment(0, {"a": -1})], "'a'"),
        ([MixSegment(0, {"a": float("nan")})], "'a'"),
        ([MixSegment(0, {"a": 0})], "above 0"),
        ([MixSegment(0, {"empty": 1})], "'empty' is empty"),
        ([MixSegment(0, {"a": 1, "b": 1e-9})], "'b' is under"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(segments: list[MixSegment], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture({"a": [3], "b": [3], "empty": [0]}, seed=0, window_shards=1, segments=segments)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(1, 4096))
def test_largest_remainder(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    quotas = largest_remainder(shares, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - shares * total) < 1 + 1e-6).all()
