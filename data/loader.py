"""Batches for one rank, in order of steps, prepared ahead by worker processes.

A worker is handed a step and makes its batch from nothing else: the plan says which samples, and crop, flip and
caption follow from the stream position. So a run resumes at any step at once, and numbers do not depend on workers.
"""

import atexit
import ctypes
import functools
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from data.batches import Batch, BatchRequest, Decode, Failure, Steps, as_it_is, unwrap
from data.counts import Sums
from data.encode.stored import Stored
from data.plan import SampleRef
from data.prefetch import Prefetcher
from data.reader import Dataset
from data.slots import SlotRef, Slots
from data.storage import DamagedShard, MissingShard

_POLL_S = 2.0
"""How often a wait for a batch looks whether the workers live."""
_WORKER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to a whole job; the trainer acts on them, and needs its workers until it has saved."""


BadShards = dict[tuple[str, int], str]
"""(dataset, shard) to `missing_shard` or `damaged_shard`."""


OF_SHARDS = (MissingShard.reason, DamagedShard.reason)
"""Reasons of substitutions that are a shard's."""


class LoaderError(RuntimeError):
    """Batches stopped coming: a worker died or hangs. Worth a restart."""


class WorkerDied(LoaderError):
    pass


@dataclass(frozen=True)
class _Task:
    """What a worker is sent."""

    step: int
    bad_shards: tuple[tuple[tuple[str, int], str], ...]
    """Not to be read, as far as they were agreed on when this was sent."""
    given_back: tuple[SlotRef, ...] = ()
    """Of the worker that gets this."""


class _Tasks:
    """The steps, in order; each told what is known when it is sent. DataLoader sends them to its workers in turns."""

    def __init__(self, first: int, end: int, num_workers: int, bad_shards: BadShards) -> None:
        self._steps, self._bad_shards = range(first, end), bad_shards
        self._given_back: list[list[SlotRef]] = [[] for _ in range(max(num_workers, 1))]

    def give_back(self, slot: SlotRef) -> None:
        """Nobody reads it any more."""
        self._given_back[slot.worker].append(slot)

    def __iter__(self) -> Iterator[_Task]:
        for i, step in enumerate(self._steps):
            worker = i % len(self._given_back)
            given_back, self._given_back[worker] = self._given_back[worker], []
            yield _Task(step, tuple(self._bad_shards.items()), tuple(given_back))

    def __len__(self) -> int:
        return len(self._steps)


class _Maker(TorchDataset[Any]):
    """Step to batch, with what comes before: shards on their way, and those that are left out. Runs in the workers."""

    def __init__(
        self, steps: Steps, datasets: dict[str, Dataset], request: Callable[[int], BatchRequest], prefetch_shards: int
    ) -> None:
        self._steps, self._datasets, self._request = steps, datasets, request
        self._prefetch_shards = prefetch_shards
        self._end = self._stride = 0
        self._prefetcher: Prefetcher | None = None
        self._slots: Slots | None = None
        self._slot: SlotRef | None = None

    def begin(self, end: int, num_workers: int) -> None:
        """Before it is sent to workers that share the steps up to `end`, in turns."""
        self._end, self._stride = end, max(num_workers, 1)

    def __getitem__(self, task: _Task) -> "Batch | Failure | _Packed":
        """In a worker."""
        if self._slots is None:
            worker = get_worker_info()
            assert worker is not None
            self._slots = Slots(worker.id)
            self._steps.memory = self._memory
        self._slots.give_back(task.given_back)
        self._slot = None
        made = self.make(task)
        return _Packed.of(made, self._slot) if isinstance(made, Batch) else made

    def _memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=torch.uint8)
        assert self._slots is not None
        self._slot, tensor = self._slots.take(shape)
        return tensor

    def make(self, task: _Task) -> Batch | Failure:
        for (name, shard_index), reason in task.bad_shards:
            if name in self._datasets:
                self._datasets[name].leave_out(shard_index, reason)
        if self._prefetch_shards:
            if self._prefetcher is None:
                steps = range(task.step, self._end, self._stride)
                self._prefetcher = Prefetcher(
                    self._datasets, _copy(self._request), steps, max_shards=self._prefetch_shards
                )
            self._prefetcher.at(task.step)
        made = self._steps[task.step]
        if isinstance(made, Batch):
            bad_shards: BadShards = {}
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
class _Packed:
    """A batch on its way: its small tensors are no tensors, each of which takes a connection between the processes."""

    batch: Batch
    slot: SlotRef | None
    """That its images lie in."""
    positions_B: NDArray[np.int64]
    labels_B: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch, slot: SlotRef | None) -> "_Packed":
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


class Loader:
    """One rank's batches. Use as a context manager, or close it: it owns processes."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        request: Callable[[int], BatchRequest],
        *,
        seed: int,
        random_crop: bool,
        flip_probability: float,
        caption_weights: Mapping[str, float] | None = None,
        num_workers: int,
        prefetch_steps: int,
        timeout_s: float,
        substitutions: Mapping[SampleRef, SampleRef] | None = None,
        stored: Stored | None = None,
        decode: Decode = "balanced",
        prefetch_shards: int = 0,
        bad_shards: Mapping[tuple[str, int], str] | None = None,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            request: what a step needs; called in the workers, so it must pickle when there are any.
            caption_weights: of the kinds of captions; without any, all of a sample's captions are alike.
            num_workers: processes; 0 prepares batches in this one, where a stall has no deadline.
            prefetch_steps: batches that each worker prepares ahead.
            timeout_s: longest wait for a batch.
            substitutions: samples known to be bad and what stands for them, from a checkpoint; they are not read.
            stored: columns that stand for images or captions; without any, those themselves.
            decode: how exactly JPEGs are shrunk.
            prefetch_shards: shards that each worker fetches before the step that needs them first.
            bad_shards: (dataset, shard) not to be read, and why, from a checkpoint.
            pin_memory: of images; for a copy to a CUDA device that nobody waits for.
        """
        self._datasets = dict(datasets)
        self._bad_shards = dict(bad_shards or {})
        self._pin_memory = pin_memory
        steps = Steps(
            self._datasets,
            request,
            seed=seed,
            random_crop=random_crop,
            flip_probability=flip_probability,
            caption_weights=dict(caption_weights or {}),
            substitutions=dict(substitutions or {}),
            stored=stored,
            decode=decode,
        )
        self._maker = _Maker(steps, self._datasets, request, prefetch_shards)
        self._num_workers, self._prefetch_steps, self._timeout_s = num_workers, prefetch_steps, timeout_s
        self._workers: list[BaseProcess] = []
        if num_workers:
            _start_forkserver()  # takes seconds, while the caller builds its model

    def steps(self, first: int, end: int) -> Generator[Batch, None, None]:
        """One batch for each of the steps `first` to `end - 1`, in order.

        Raises:
            UserError: a dataset is damaged, or too many of its images are.
            StorageError: storage does not answer.
            LoaderError: a worker died, or no batch came within the timeout.
        """
        self.close()
        num_workers = min(self._num_workers, max(end - first, 1))
        tasks = _Tasks(first, end, num_workers, self._bad_shards)
        mapped: dict[SlotRef, torch.Tensor] = {}  # a slot stays mapped here, rather than page by page for each batch
        self._maker.begin(end, num_workers)
        if not num_workers:
            try:
                for task in tasks:
                    yield unwrap(self._maker.make(task))
            finally:
                self._maker.close()
            return
        loader: DataLoader[Batch | Failure | _Packed] = DataLoader(
            self._maker,
            batch_size=None,
            sampler=tasks,
            collate_fn=as_it_is,
            num_workers=num_workers,
            prefetch_factor=self._prefetch_steps,
            timeout=min(_POLL_S, self._timeout_s),
            worker_init_fn=functools.partial(_become_worker, environment=dict(os.environ)),
            multiprocessing_context="forkserver",
            generator=torch.Generator(),  # for a seed that nobody uses; without it the global generator moves on
        )
        others = set(multiprocessing.active_children())
        batches = iter(loader)
        self._workers = workers = [w for w in multiprocessing.active_children() if w not in others]
        kill = functools.partial(_kill, workers)
        atexit.register(kill)  # before multiprocessing's own exit, which would wait for them for ever
        try:
            for step in range(first, end):
                made = self._next(batches, step, workers)
                if isinstance(made, _Packed):
                    batch = made.unpacked(pin=self._pin_memory)
                    if made.slot:
                        mapped[made.slot] = made.batch.images_BCHW
                        tasks.give_back(made.slot)
                    yield batch
                else:
                    yield unwrap(made)
        finally:
            # What they still prepare nobody needs, and files they write are renamed when whole.
            kill()
            atexit.unregister(kill)
            del batches

    def _next(self, batches: Iterator[Any], step: int, workers: list[BaseProcess]) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return next(batches)
            except (RuntimeError, EOFError, ConnectionError) as e:
                # EOF or no connection: it died before its batch's shared memory was handed over. Its death may be
                # known a moment later.
                wait([worker.sentinel for worker in workers], timeout=0 if isinstance(e, RuntimeError) else 5)
                for worker in workers:
                    if not worker.is_alive():
                        cause = _cause_of(worker.exitcode)
                        raise WorkerDied(f"step {step}: data worker {worker.pid} died ({cause}); see the log") from e
                if not str(e).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() >= deadline:
                    raise LoaderError(
                        f"step {step}: no batch within data.timeout_s = {self._timeout_s:g} s; storage or a worker "
                        "hangs, or data.num_workers is too low"
                    ) from e

    def leave_out(self, bad_shards: Mapping[tuple[str, int], str]) -> None:
        """Shards that all ranks have agreed not to read; of steps that are asked for from now on."""
        self._bad_shards |= bad_shards

    def close(self) -> None:
        """End the workers. Batches handed out stay valid."""
        _kill(self._workers)
        self._workers = []

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -------------------------------------------------------------------------------------------------------------- workers


def _start_forkserver() -> None:
    """Start the process that workers are forked from.

    Forking the trainer itself is unsafe once it has threads, and a fresh interpreter for each worker would import
    torch each time. Signals are blocked while it starts, and stay so in it: it must outlive a SIGTERM to the job.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader"])
    multiprocessing.resource_tracker.ensure_running()  # first, since its start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WORKER_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become_worker(_worker_id: int, environment: dict[str, str]) -> None:
    """Runs first in each worker. The fork server's environment is as old as that; where storage is may be known since."""
    _die_with_trainer()
    os.environ.clear()
    os.environ.update(environment)
    for number in _WORKER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WORKER_SIGNALS)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # 0 is OpenCV's word for none but the caller's


def _die_with_trainer() -> None:
    """Also when it is killed. The fork server alone is no sign: it lives as long as any of its workers."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch the trainer", daemon=True).start()
    if sys.platform == "linux":  # should the fork server be killed, nobody could end or replace its workers
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        if ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _kill(workers: list[BaseProcess]) -> None:
    """SIGKILL, since workers ignore SIGTERM."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join()


def _cause_of(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hints = {"SIGKILL": "; out of memory?", "SIGBUS": "; /dev/shm full? Give the container more shared memory"}
        return f"by {name}{hints.get(name, '')}"
    return f"exit code {exit_code}"
