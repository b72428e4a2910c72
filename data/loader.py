"""Batches for one rank, in order of steps, prepared ahead by worker processes.

A worker is handed a step and makes its batch from nothing else: the plan says which samples, and crop, flip and
caption follow from the stream position. So a run resumes at any step at once, and numbers do not depend on workers.
"""

import atexit
import ctypes
import functools
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data import draws
from data.images import ImageError, read_image
from data.plan import SampleRef
from data.reader import Dataset
from data.schema import Sample
from data.transforms import training_image
from trainer.errors import UserError

_MAX_REPLACEMENTS = 8
"""Undecodable replacements in a row for one sample; that many mean the dataset is at fault, not an image."""
_DECODE_MARGIN = 2
"""JPEGs are decoded no smaller than so many times the resolution. Area averaging then gives what it gives on the full
image, to 33-43 dB on photos of 640 px at 64 to 256 px; without the margin 30-32 dB."""
_POLL_S = 2.0
"""How often a wait for a batch looks whether the workers live."""
_WORKER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to a whole job; the trainer acts on them, and needs its workers until it has saved."""


@dataclass(frozen=True)
class BatchRequest:
    """What one rank needs for one step."""

    step: int
    first_position: int
    refs: tuple[SampleRef, ...]
    """refs[i] stands at stream position first_position + i."""
    resolution: int
    """Side of the square images, in pixels."""


@dataclass(frozen=True)
class Substitution:
    """A sample that could not be decoded, and what took its place."""

    position: int
    bad: SampleRef
    used: SampleRef
    reason: str
    """One of few words, fit to label a count."""


@dataclass
class Batch:
    step: int
    resolution: int
    positions_B: torch.Tensor
    """int64; places in the stream."""
    images_BCHW: torch.Tensor
    """uint8, RGB."""
    captions: list[str]
    labels_B: torch.Tensor
    """int64; -1 where none."""
    keys: list[str]
    """dataset/key; names images in errors."""
    substitutions: tuple[Substitution, ...]
    """Made in this batch."""


class LoaderError(RuntimeError):
    """Batches stopped coming: a worker died or hangs. Worth a restart."""


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
        num_workers: int,
        prefetch_steps: int,
        timeout_s: float,
        substitutions: Mapping[SampleRef, SampleRef] | None = None,
    ) -> None:
        """
        Args:
            request: what a step needs; called in the workers, so it must pickle when there are any.
            num_workers: processes; 0 prepares batches in this one, where a stall has no deadline.
            prefetch_steps: batches that each worker prepares ahead.
            timeout_s: longest wait for a batch.
            substitutions: samples known to be bad and what stands for them, from a checkpoint; they are not read.
        """
        self._steps = _Steps(dict(datasets), request, seed, random_crop, flip_probability, dict(substitutions or {}))
        self._num_workers, self._prefetch_steps, self._timeout_s = num_workers, prefetch_steps, timeout_s
        self._workers: list[BaseProcess] = []
        if num_workers:
            _start_forkserver()  # takes seconds, while the caller builds its model

    def steps(self, first: int, end: int) -> Generator[Batch, None, None]:
        """One batch for each of the steps `first` to `end - 1`, in order.

        Raises:
            UserError: a dataset is damaged, or too many of its images are.
            LoaderError: a worker died, or no batch came within the timeout.
        """
        self.close()
        if not self._num_workers:
            for step in range(first, end):
                yield _unwrap(self._steps[step])
            return
        loader: DataLoader[Batch | _Failure] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=range(first, end),
            collate_fn=_as_it_is,
            num_workers=min(self._num_workers, max(end - first, 1)),
            prefetch_factor=self._prefetch_steps,
            timeout=min(_POLL_S, self._timeout_s),
            worker_init_fn=_become_worker,
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
                yield _unwrap(self._next(batches, step, workers))
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
                        raise LoaderError(f"step {step}: data worker {worker.pid} died ({cause}); see the log") from e
                if not str(e).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() >= deadline:
                    raise LoaderError(
                        f"step {step}: no batch within data.timeout_s = {self._timeout_s:g} s; storage or a worker "
                        "hangs, or data.num_workers is too low"
                    ) from e

    def close(self) -> None:
        """End the workers. Batches handed out stay valid."""
        _kill(self._workers)
        self._workers = []

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Failure:
    """An error that crosses from worker to trainer as a value: torch would wrap the message in a traceback."""

    message: str


def _unwrap(made: "Batch | _Failure") -> Batch:
    if isinstance(made, _Failure):
        raise UserError(made.message)
    return made


def _as_it_is(made: Any) -> Any:
    return made


class _Steps(TorchDataset[Any]):
    """Step to batch; what the workers run."""

    def __init__(
        self,
        datasets: dict[str, Dataset],
        request: Callable[[int], BatchRequest],
        seed: int,
        random_crop: bool,
        flip_probability: float,
        substitutions: dict[SampleRef, SampleRef],
    ) -> None:
        self._datasets, self._request, self._seed = datasets, request, seed
        self._random_crop, self._flip_probability = random_crop, flip_probability
        self._substitutions = substitutions

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self._batch(self._request(step))
        except UserError as e:
            return _Failure(str(e))

    def _batch(self, request: BatchRequest) -> Batch:
        size = request.resolution
        images_BHWC = np.empty((len(request.refs), size, size, 3), dtype=np.uint8)
        captions: list[str] = []
        labels: list[int] = []
        keys: list[str] = []
        substitutions: list[Substitution] = []
        positions = range(request.first_position, request.first_position + len(request.refs))
        for i, (position, ref) in enumerate(zip(positions, request.refs, strict=True)):
            sample, pixels_HWC, used, reason = self._decodable(ref, size)
            if used != ref:
                substitutions.append(Substitution(position, bad=ref, used=used, reason=reason))
            u_crop, u_flip, u_caption = self._crop_flip_caption(position)
            images_BHWC[i] = training_image(
                pixels_HWC, size, u_crop=u_crop if self._random_crop else None, flip=u_flip < self._flip_probability
            )
            captions.append(sample.captions[int(u_caption * len(sample.captions))] if sample.captions else "")
            labels.append(sample.label)
            keys.append(f"{used.dataset}/{sample.key}")
        return Batch(
            step=request.step,
            resolution=size,
            positions_B=torch.tensor(positions, dtype=torch.int64),
            images_BCHW=torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous(),
            captions=captions,
            labels_B=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            substitutions=tuple(substitutions),
        )

    def _decodable(self, ref: SampleRef, size: int) -> tuple[Sample, np.ndarray, SampleRef, str]:
        """A sample with its pixels: of `ref`, or of what replaces it, with the reason."""
        used = self._substitutions.get(ref, ref)
        reason = "known" if used != ref else ""
        for attempt in range(_MAX_REPLACEMENTS + 1):
            sample = self._datasets[used.dataset].read(used.index)
            try:
                return sample, read_image(sample.image, min_side=_DECODE_MARGIN * size), used, reason
            except ImageError as e:
                reason, where, detail = e.reason, f"{used.dataset}/{sample.key}", str(e)
            used = self._replacement(ref, attempt)
        raise UserError(
            f"dataset {ref.dataset}: {_MAX_REPLACEMENTS} replacements of sample {ref.index} are undecodable too, the "
            f"last is {where} ({detail}); run `loupe data verify {self._datasets[ref.dataset].url}`"
        )

    def _replacement(self, bad: SampleRef, attempt: int) -> SampleRef:
        """Another sample of the same dataset. A function of the bad sample rather than of its position, so that it
        has one replacement through the run, found again alike by every rank, worker and restart."""
        number = draws.raw(self._seed, f"replace/{bad.dataset}", bad.index, attempt, count=1)[0]
        return SampleRef(bad.dataset, int(number) % self._datasets[bad.dataset].num_samples)

    def _crop_flip_caption(self, position: int) -> tuple[float, float, float]:
        """Numbers in [0, 1), each for one purpose, always drawn in this order."""
        u_crop, u_flip, u_caption = draws.uniform(self._seed, "augment", position, count=3)
        return float(u_crop), float(u_flip), float(u_caption)


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


def _become_worker(_worker_id: int) -> None:
    """Runs first in each worker."""
    _die_with_trainer()
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
