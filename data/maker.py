"""From a step to its batch, in a data worker: what comes before it, and how it gets to the trainer."""

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from data.batches import Batch, BatchRequest, Failure, LeftOut, ShardKey, Steps
from data.counts import Sums
from data.prefetch import Prefetcher
from data.reader import Dataset
from data.slots import SlotRef, Slots


@dataclass(frozen=True)
class Task:
    """What a worker is sent."""

    step: int
    given_back: tuple[SlotRef, ...] = ()
    """Of the worker that gets this."""


class Tasks:
    """The steps, in order; each told what is known when it is sent. DataLoader sends them to its workers in turns."""

    def __init__(self, first: int, end: int, num_workers: int) -> None:
        self._steps = range(first, end)
        self._given_back: list[list[SlotRef]] = [[] for _ in range(max(num_workers, 1))]

    def give_back(self, slot: SlotRef) -> None:
        """Nobody reads it any more."""
        self._given_back[slot.worker].append(slot)

    def __iter__(self) -> Iterator[Task]:
        for i, step in enumerate(self._steps):
            worker = i % len(self._given_back)
            given_back, self._given_back[worker] = self._given_back[worker], []
            yield Task(step, tuple(given_back))

    def __len__(self) -> int:
        return len(self._steps)


class Maker(TorchDataset[Any]):
    """Step to batch, with what comes before: shards on their way, and those that are left out. Runs in the workers."""

    def __init__(
        self, steps: Steps, datasets: dict[str, Dataset], request: Callable[[int], BatchRequest], prefetch_shards: int
    ) -> None:
        self._steps, self._datasets, self._request = steps, datasets, request
        self._prefetch_shards = prefetch_shards
        self._end = self._stride = 0
        self._left_out: dict[ShardKey, LeftOut] = {}
        self._prefetcher: Prefetcher | None = None
        self._slots: Slots | None = None
        self._slot: SlotRef | None = None

    def begin(self, end: int, num_workers: int, left_out: Mapping[ShardKey, LeftOut]) -> None:
        """Before it is sent to workers that share the steps up to `end`, in turns.

        Args:
            left_out: not to be read, each from its step on. All that this and its workers go by: what a process has found
                out for itself before is forgotten, as other ranks may not know it.
        """
        self._end, self._stride = end, max(num_workers, 1)
        self._left_out = {shard: how for shard, how in left_out.items() if shard[0] in self._datasets}
        for dataset in self._datasets.values():
            dataset.forget_bad_shards()

    def __getitem__(self, task: Task) -> "Batch | Failure | Packed":
        """In a worker."""
        if self._slots is None:
            worker = get_worker_info()
            assert worker is not None
            self._slots = Slots(worker.id)
            self._steps.memory = self._memory
        self._slots.give_back(task.given_back)
        self._slot = None
        made = self.make(task)
        return Packed.of(made, self._slot) if isinstance(made, Batch) else made

    def _memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=torch.uint8)
        assert self._slots is not None
        self._slot, tensor = self._slots.take(shape)
        return tensor

    def make(self, task: Task) -> Batch | Failure:
        for (name, shard_index), how in self._left_out.items():
            if how.since <= task.step:
                self._datasets[name].leave_out(shard_index, how.reason)
        if self._prefetch_shards:
            if self._prefetcher is None:
                steps = range(task.step, self._end, self._stride)
                self._prefetcher = Prefetcher(
                    self._datasets, _copy(self._request), steps, max_shards=self._prefetch_shards,
                    left_out=self._left_out,
                )  # fmt: skip
            self._prefetcher.at(task.step)
        made = self._steps[task.step]
        if isinstance(made, Batch):
            bad_shards: dict[ShardKey, str] = {}
            counts: Sums = {}
            for name, dataset in self._datasets.items():
                new, counted = dataset.news()
                bad_shards |= {(name, shard_index): reason for shard_index, reason in new.items()}
                for key, value in counted.items():
                    counts[key] = counts.get(key, 0.0) + value
            made.bad_shards, made.counts = bad_shards, counts
        return made

    def close(self) -> None:
        if self._prefetcher:
            self._prefetcher.close()
            self._prefetcher = None


@dataclass(frozen=True)
class Packed:
    """A batch on its way: its small tensors are no tensors, each of which takes a connection between the processes."""

    batch: Batch
    slot: SlotRef | None
    """That its images lie in."""
    positions_B: NDArray[np.int64]
    labels_B: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch, slot: SlotRef | None) -> "Packed":
        none = torch.empty(0, dtype=torch.int64)
        light = replace(batch, positions_B=none, labels_B=none)
        return cls(light, slot, batch.positions_B.numpy(), batch.labels_B.numpy())

    def unpacked(self, *, pin: bool) -> Batch:
        """With images of its own."""
        shared_BCHW = self.batch.images_BCHW
        return replace(
            self.batch,
            images_BCHW=torch.empty(shared_BCHW.shape, dtype=torch.uint8, pin_memory=pin).copy_(shared_BCHW),
            positions_B=torch.from_numpy(self.positions_B),
            labels_B=torch.from_numpy(self.labels_B),
        )


def _copy(request: Callable[[int], BatchRequest]) -> Callable[[int], BatchRequest]:
    """For another thread. Arrays are shared, as they are large and nobody writes to them."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(request, protocol=5, buffer_callback=buffers.append)
    copied: Callable[[int], BatchRequest] = pickle.loads(data, buffers=buffers)  # noqa: S301  made in the line before
    return copied
