"""The loader where shards are bad, and where they come ahead of the steps that need them."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data.batches import Batch, BatchRequest, LeftOut
from data.plan import MixSegment, Mixture, SampleRef
from data.prefetch import Prefetcher
from data.reader import Dataset, open_dataset

from .conftest import MakeDataset
from .test_loader import assert_equal, make_loader

# ---------------------------------------------------------------------------------------------------- bad shards


def break_shard(folder: Path, index: int, how: str = "cut") -> None:
    shard = folder / f"shard.{index:05d}.mds"
    data = shard.read_bytes()
    shard.unlink()
    if how == "cut":
        shard.write_bytes(data[:-1])


@pytest.mark.parametrize(("how", "reason"), [("cut", "damaged_shard"), ("gone", "missing_shard")])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_shard_is_left_out_and_told_of(
    make_dataset: MakeDataset, how: str, reason: str, num_workers: int
) -> None:
    folder = make_dataset(20, shard_kib=8)
    break_shard(folder, 1, how)
    dataset = open_dataset(str(folder), name="x")
    first, end = int(dataset.shard_sizes[0]), int(dataset.shard_sizes[:2].sum())
    with make_loader(dataset, num_workers=num_workers) as loader:
        batches = list(loader.steps(0, 15))
    made = [s for batch in batches for s in batch.substitutions]
    assert {s.bad.index for s in made} == set(range(first, end))
    assert {s.reason for s in made} == {reason}
    assert not {s.used.index for s in made} & set(range(first, end))
    used: dict[int, set[int]] = {}
    for s in made:
        used.setdefault(s.bad.index, set()).add(s.used.index)
    assert all(len(indices) == 1 for indices in used.values())  # the same in each epoch and by each worker
    told = [batch.bad_shards for batch in batches if batch.bad_shards]
    assert told == [{("x", 1): reason}] * max(num_workers, 1)


def test_a_resumed_run_leaves_out_alike_though_storage_was_mended(make_dataset: MakeDataset) -> None:
    folder = make_dataset(20, shard_kib=8)
    whole = (folder / "shard.00001.mds").read_bytes()
    break_shard(folder, 1)
    straight = list(make_loader(open_dataset(str(folder), name="x")).steps(0, 15))
    (folder / "shard.00001.mds").write_bytes(whole)
    mended = open_dataset(str(folder), name="x")
    resumed = list(
        make_loader(
            mended,
            left_out={("x", 1): LeftOut("damaged_shard", since=0), ("gone", 3): LeftOut("missing_shard", since=0)},
        ).steps(6, 15)
    )
    assert [batch.keys for batch in resumed] == [batch.keys for batch in straight[6:]]
    assert_equal(resumed, straight[6:])
    assert not any(batch.bad_shards for batch in resumed)  # known already
    fresh = list(make_loader(open_dataset(str(folder), name="x")).steps(6, 15))
    assert [batch.keys for batch in fresh] != [batch.keys for batch in resumed]


def has_samples_of(dataset: Dataset, shard: int, batch: Batch) -> bool:
    return any(dataset.locate(int(key[2:6]))[0] == shard for key in batch.keys)


@pytest.mark.parametrize(("num_workers", "prefetch_shards"), [(0, 0), (0, 3), (1, 3), (2, 0)])
def test_what_ranks_agree_on_holds_from_that_very_batch_on(
    make_dataset: MakeDataset, num_workers: int, prefetch_shards: int
) -> None:
    """Though workers had made it and some after it otherwise. Before it nothing changes, in a resume from there neither."""
    dataset = open_dataset(str(make_dataset(20, shard_kib=8)), name="x")
    whole = list(make_loader(dataset).steps(0, 20))
    first = next(batch.step for batch in whole if batch.step > 6 and has_samples_of(dataset, 2, batch))
    left_out = {("x", 2): LeftOut("missing_shard", since=first)}
    options = {"num_workers": num_workers, "prefetch_shards": prefetch_shards}
    handed: list[int] = []
    batches: dict[int, Batch] = {}
    with make_loader(dataset, **options) as loader:
        for batch in loader.steps(0, 20):
            if batch.step == first and first not in handed:
                loader.leave_out(left_out)
            handed.append(batch.step)
            batches[batch.step] = batch
    assert handed == [*range(first + 1), *range(first, 20)]
    assert_equal(whole[:first], [batches[step] for step in range(first)])
    after = [batches[step] for step in range(first, 20)]
    assert not any(has_samples_of(dataset, 2, batch) for batch in after)
    assert {s.reason for batch in after for s in batch.substitutions} == {"missing_shard"}
    assert not any(batch.bad_shards for batch in batches.values())
    with make_loader(dataset, left_out=left_out, **options) as loader:
        assert_equal(list(loader.steps(2, 20)), [batches[step] for step in range(2, 20)])


def test_what_one_process_found_out_alone_is_forgotten(make_dataset: MakeDataset) -> None:
    """Workers are copies of the trainer's datasets, with which it may have read on its own."""
    dataset = open_dataset(str(make_dataset(20, shard_kib=8)), name="x")
    expected = list(make_loader(dataset).steps(0, 5))
    for num_workers in (0, 1):
        dataset.leave_out(0, "missing_shard")
        with make_loader(dataset, num_workers=num_workers) as loader:
            assert_equal(list(loader.steps(0, 5)), expected)


def test_a_replacement_may_lie_in_a_bad_shard_too(make_dataset: MakeDataset) -> None:
    """Most of a dataset is gone: what is left stands for it."""
    folder = make_dataset(20, shard_kib=8)
    dataset = open_dataset(str(folder), name="x")
    for i in range(1, len(dataset.shards)):
        break_shard(folder, i)
    left = int(dataset.shard_sizes[0])
    batches = list(make_loader(dataset).steps(0, 10))
    assert {int(key[2:6]) for batch in batches for key in batch.keys} <= set(range(left))


# ------------------------------------------------------------------------------------------------------- prefetch


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Noted(Dataset):
    """Keeps which shards were asked for ahead, and how long each takes to come."""

    prepared: list[int]
    waited: list[int]
    come: set[int]
    delay_s = 0.05

    def prepare(self, shard_index: int, *, wait: bool = True) -> bool:
        (self.waited if wait else self.prepared).append(shard_index)
        if shard_index not in self._open:
            time.sleep(self.delay_s)
        here = super().prepare(shard_index, wait=wait)
        self.come.add(shard_index)
        return here


def noted(make_dataset: MakeDataset) -> Noted:
    dataset = open_dataset(str(make_dataset(40, shard_kib=8)), name="x")
    dataset.__class__ = Noted
    assert isinstance(dataset, Noted)
    dataset.prepared, dataset.waited, dataset.come = [], [], set()
    return dataset


def test_shards_come_before_they_are_needed_and_in_order(make_dataset: MakeDataset) -> None:
    dataset = noted(make_dataset)
    mixture = Mixture({"x": dataset.shard_sizes}, seed=5, window_shards=2, segments=[MixSegment(0, {"x": 1})])
    needed = list(dict.fromkeys(dataset.locate(ref.index)[0] for ref in mixture.refs(0, 40)))
    with make_loader(dataset, prefetch_shards=4) as loader:
        for batch in loader.steps(0, 10):
            if batch.step == 0:
                wait_for(lambda: len(dataset.prepared) >= 4)
                assert dataset.prepared[:4] == needed[:4]
                assert len(dataset.prepared) <= 4 + 3  # those ahead, and those that the first step needed
            coming = {dataset.locate(ref.index)[0] for ref in mixture.refs(4 * (batch.step + 1), 4)}
            wait_for(partial(coming.issubset, dataset.come))  # a step of training
    assert sorted(set(dataset.prepared)) == sorted(needed)
    assert len(dataset.waited) <= 3  # of the first step


def test_without_prefetching_each_shard_is_waited_for(make_dataset: MakeDataset) -> None:
    dataset = noted(make_dataset)
    with make_loader(dataset, prefetch_shards=0) as loader:
        batches = list(loader.steps(0, 10))
    assert not dataset.prepared
    assert sorted(dataset.waited) == list(range(len(dataset.shards)))
    waited = sum(batch.counts.get(("loupe_data_shard_wait_seconds_total",), 0) for batch in batches)
    assert waited > 0.04 * len(dataset.shards)


def test_prefetching_changes_nothing(make_dataset: MakeDataset) -> None:
    folder = make_dataset(30, shard_kib=8)
    break_shard(folder, 2)
    alone = list(make_loader(open_dataset(str(folder), name="x")).steps(0, 20))
    with make_loader(open_dataset(str(folder), name="x"), num_workers=2, prefetch_shards=3) as loader:
        assert_equal(alone, list(loader.steps(0, 20)))


def test_a_shard_that_is_left_out_is_fetched_for_the_steps_before_alone(make_dataset: MakeDataset) -> None:
    dataset = noted(make_dataset)
    last = len(dataset.shards) - 1

    def request(step: int) -> BatchRequest:
        row = 0 if step else dataset.num_samples - 1
        return BatchRequest(step, step, (SampleRef("x", row), SampleRef("x", dataset.num_samples - 1)), 16)

    for since, prepared in ((1, {0, last}), (0, {0})):
        dataset.prepared.clear()
        left_out = {("x", last): LeftOut("missing_shard", since)}
        prefetcher = Prefetcher({"x": dataset}, request, range(4), max_shards=4, left_out=left_out)
        for step in range(4):
            prefetcher.at(step)
            wait_for(partial(prepared.issubset, dataset.prepared))
            time.sleep(0.05)
        prefetcher.close()
        assert set(dataset.prepared) == prepared


def test_a_mistake_in_the_plan_is_raised_in_the_worker(make_dataset: MakeDataset) -> None:
    dataset = open_dataset(str(make_dataset(5)), name="x")

    def request(step: int) -> BatchRequest:
        return BatchRequest(step, step, (SampleRef("x", 0 if step < 3 else 99),), 16)

    prefetcher = Prefetcher({"x": dataset}, request, range(10), max_shards=4)

    def wait_for_it() -> None:
        for _ in range(2000):
            prefetcher.at(0)
            time.sleep(0.05)

    with pytest.raises(IndexError, match="no sample 99"):
        wait_for_it()
