"""Batches for one rank, in order of steps, prepared ahead by worker processes.

A worker is handed a step and makes its batch from nothing else: the plan says which samples, and crop, flip and
caption follow from the stream position. So a run resumes at any step at once, and numbers do not depend on workers.
"""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.context
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.batches import Batch, BatchRequest, Decode, Failure, LeftOut, ShardKey, Steps, as_it_is, unwrap
from data.encode.stored import Stored
from data.forkserver import start_forkserver
from data.maker import Maker, Packed, Tasks
from data.plan import SampleRef
from data.reader import Dataset
from data.slots import SlotRef
from data.worker_processes import become_worker, cause_of, kill

_POLL_S = 2.0
"""How often a wait for a batch looks whether the workers live."""


class LoaderError(RuntimeError):
    """Batches stopped coming: a worker died or hangs. Worth a restart."""


class WorkerDied(LoaderError):
    pass


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
        left_out: Mapping[ShardKey, LeftOut] | None = None,
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
            left_out: shards that are not read, from a checkpoint.
            pin_memory: of images; for a copy to a CUDA device that nobody waits for.
        """
        self._datasets = dict(datasets)
        self._left_out = dict(left_out or {})
        self._again = False
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
        self._maker = Maker(steps, self._datasets, request, prefetch_shards)
        self._num_workers, self._prefetch_steps, self._timeout_s = num_workers, prefetch_steps, timeout_s
        self._workers: list[BaseProcess] = []
        if num_workers:
            start_forkserver()  # unless the caller has, before it imported torch

    def steps(self, first: int, end: int) -> Generator[Batch, None, None]:
        """One batch for each of the steps `first` to `end - 1`, in order.

        Raises:
            UserError: a dataset is damaged, or too many of its images are.
            StorageError: storage does not answer.
            LoaderError: a worker died, or no batch came within the timeout.
        """
        while first < end:
            self.close()
            self._again = False
            made = self._by_workers(first, end) if self._num_workers else self._in_this_process(first, end)
            with contextlib.closing(made):
                for batch in made:
                    yield batch
                    if self._again:
                        first = batch.step
                        break
                else:
                    return

    def _in_this_process(self, first: int, end: int) -> Generator[Batch, None, None]:
        self._maker.begin(end, 0, self._left_out)
        try:
            for task in Tasks(first, end, 0):
                yield unwrap(self._maker.make(task))
        finally:
            self._maker.close()

    def _by_workers(self, first: int, end: int) -> Generator[Batch, None, None]:
        num_workers = min(self._num_workers, end - first)
        tasks = Tasks(first, end, num_workers)
        # a slot stays mapped here, rather than page by page for each batch
        mapped: dict[SlotRef, torch.Tensor] = {}
        self._maker.begin(end, num_workers, self._left_out)
        loader: DataLoader[Batch | Failure | Packed] = DataLoader(
            self._maker,
            batch_size=None,
            sampler=tasks,
            collate_fn=as_it_is,
            num_workers=num_workers,
            prefetch_factor=self._prefetch_steps,
            timeout=min(_POLL_S, self._timeout_s),
            worker_init_fn=functools.partial(become_worker, environment=dict(os.environ)),
            multiprocessing_context="forkserver",
            # for a seed that nobody uses; without it the global generator moves on
            generator=torch.Generator(),
        )
        others = set(multiprocessing.active_children())
        batches = iter(loader)
        self._workers = workers = [w for w in multiprocessing.active_children() if w not in others]
        kill_them = functools.partial(kill, workers)
        # before multiprocessing's own exit, which would wait for them for ever
        atexit.register(kill_them)
        try:
            for step in range(first, end):
                made = self._next(batches, step, workers)
                if isinstance(made, Packed):
                    batch = made.unpacked(pin=self._pin_memory)
                    if made.slot:
                        mapped[made.slot] = made.batch.images_BCHW
                        tasks.give_back(made.slot)
                    yield batch
                else:
                    yield unwrap(made)
        finally:
            # What they still prepare nobody needs, and files they write are renamed when whole.
            kill_them()
            atexit.unregister(kill_them)
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
                        cause = cause_of(worker.exitcode)
                        raise WorkerDied(f"step {step}: data worker {worker.pid} died ({cause}); see the log") from e
                if not str(e).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() >= deadline:
                    raise LoaderError(
                        f"step {step}: no batch within data.timeout_s = {self._timeout_s:g} s; storage or a worker "
                        "hangs, or data.num_workers is too low"
                    ) from e

    def leave_out(self, left_out: Mapping[ShardKey, LeftOut]) -> None:
        """Shards that all ranks have agreed not to read, each from its step on. The batch handed out last is made again by
        workers that know: it comes next, and nothing that others had prepared without knowing does."""
        self._left_out |= left_out
        self._again = True

    def close(self) -> None:
        """End the workers. Batches handed out stay valid."""
        kill(self._workers)
        self._workers = []

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
