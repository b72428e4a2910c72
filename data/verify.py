"""Check a whole dataset: every shard's hash, every count, key and label, and every image or a sample of them.

Rows are read by mosaicml-streaming's own reader, so what training reads by other code is held against the format itself.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import draws
from data.reader import Dataset, open_dataset
from data.verify_shard import Failure, Found, Job, check_shard
from trainer.errors import UserError

PARTITION_BYTES = 256 << 20
KEYS = np.dtype([("hash", "<u8"), ("row", "<u8")])


@dataclass
class Report:
    num_samples: int
    num_shards: int
    num_bytes: int
    digest: str
    decoded: int = 0
    """Images."""
    failures: list[Failure] = field(default_factory=list)
    labels: NDArray[np.int32] | None = None
    """What the shards say; of a damaged one -1."""

    @property
    def damaged(self) -> list[int]:
        """Shards."""
        return [failure.shard for failure in self.failures if failure.shard is not None]


def verify(
    url: str,
    *,
    cache_dir: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 1,
    shards: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read every byte of a dataset. A damaged shard or image is a failure of the report; all of them are found.

    Args:
        cache_dir: for shards of a remote dataset; absent: a temporary folder, so that storage itself is read.
        sample: decode so many images, drawn from `seed`; absent: all. Hashes, counts, keys and labels are checked of all.
        workers: processes; 1: this one.
        shards: numbers of those to check; absent: all.
        progress: called with samples done and samples in all.

    Raises:
        UserError: it cannot be opened at all.
        StorageError: remote storage does not answer.
    """
    dataset = open_dataset(url, name=url, cache_dir=cache_dir)
    sizes = dataset.shards.num_samples
    numbers = list(range(len(dataset.shards))) if shards is None else list(shards)
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    total = int(sizes[numbers].sum())
    report = Report(
        total, len(numbers), int(dataset.shards.num_bytes[numbers].sum()), dataset.digest,
    )  # fmt: skip
    chosen = None
    if sample is not None:
        # Fewer where one is drawn twice, which is rare unless nearly all are asked for.
        drawn = draws.raw(seed, "verify", count=sample) % np.uint64(max(1, dataset.num_samples))
        chosen = np.arange(dataset.num_samples) if sample >= dataset.num_samples else np.unique(drawn.astype(np.int64))
    with tempfile.TemporaryDirectory(prefix="loupe-verify-") as scratch:
        job = Job(dataset, scratch, cache_dir is not None)
        keys = _Keys(Path(scratch), total)
        if dataset.info.labels:
            report.labels = np.full(dataset.num_samples, -1, dtype=np.int32)
        done = 0
        for number, found in _all_shards(job, numbers, firsts, chosen, workers):
            first, count = int(firsts[number]), int(sizes[number])
            report.failures += found.failures
            report.decoded += found.decoded
            keys.add(found.keys, first)
            if report.labels is not None and len(found.labels) == count:
                report.labels[first : first + count] = found.labels
            done += count
            progress(done, total)
        report.failures += [
            Failure(f"{_place(a, dataset, firsts)} and {_place(b, dataset, firsts)} have the same key")
            for a, b in keys.twice()
        ]
    if shards is None:
        report.failures += _check_labels(dataset, report)
    return report


def _check_labels(dataset: Dataset, report: Report) -> list[Failure]:
    if report.labels is None:
        return []
    try:
        stored = dataset.read_labels()
    except UserError as e:
        return [Failure(str(e), labels=True)]
    if report.damaged:
        return []  # rows of damaged shards have no labels to compare with
    wrong = np.flatnonzero(stored != report.labels)
    if not len(wrong):
        return []
    row = int(wrong[0])
    return [
        Failure(
            f"{dataset.url}/{dataset.info.labels}: differs from the shards in {len(wrong)} rows, the first is row {row}: "
            f"{stored[row]}, the shard has {report.labels[row]}; build the dataset again",
            labels=True,
        )
    ]


def _place(row: int, dataset: Dataset, firsts: NDArray[np.int64]) -> str:
    shard = int(np.searchsorted(firsts, row, side="right")) - 1
    return f"{dataset.shards[shard].name} sample {row - int(firsts[shard])}"


# ---------------------------------------------------------------------------------------------------------------- whole


def _all_shards(
    job: Job, numbers: Sequence[int], firsts: NDArray[np.int64], chosen: NDArray[np.int64] | None, workers: int
) -> Iterator[tuple[int, Found]]:
    """Each shard's findings, as they come."""

    def rows(number: int) -> list[int] | None:
        if chosen is None:
            return None
        first, end = int(firsts[number]), int(firsts[number + 1])
        inside = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, end)]
        return [int(row) - first for row in inside]

    workers = min(workers, len(numbers))
    if workers <= 1:
        for number in numbers:
            yield number, check_shard(job, number, rows(number))
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(job,)
    )  # threads of storage clients do not survive a fork
    running: dict[Future[Found], int] = {}
    with pool:
        try:
            for number in numbers:
                running[pool.submit(_check, number, rows(number))] = number
                if len(running) >= 4 * workers:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(running: dict[Future[Found], int]) -> Iterator[tuple[int, Found]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


_job: Job | None = None
"""Of this process, in a pool."""


def _begin(job: Job) -> None:
    global _job
    _job = job


def _check(number: int, rows: Sequence[int] | None) -> Found:
    assert _job is not None
    return check_shard(_job, number, rows)


class _Keys:
    """Finds rows of equal keys in bounded memory: hashes go to files by their first bits, and each file is sorted alone. Of 300
    million keys, two different ones have the same 64 bits with a chance of 0.3 %."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self._folder = folder
        self._parts = max(1, num_samples * KEYS.itemsize // PARTITION_BYTES)
        self._held: list[NDArray[Any]] = []
        self._held_bytes = 0

    def add(self, hashes: NDArray[np.uint64], first_row: int) -> None:
        """0 for rows that could not be read."""
        rows = np.flatnonzero(hashes)
        some = np.empty(len(rows), dtype=KEYS)
        some["hash"], some["row"] = hashes[rows], rows + first_row
        self._held.append(some)
        self._held_bytes += some.nbytes
        if self._held_bytes > PARTITION_BYTES:
            self._flush()

    def _flush(self) -> None:
        held = np.concatenate([np.empty(0, dtype=KEYS), *self._held])
        self._held, self._held_bytes = [], 0
        parts = held["hash"] % np.uint64(self._parts)
        for part in np.unique(parts):
            with open(self._folder / f"keys.{part}", "ab") as file:
                file.write(held[parts == part].tobytes())

    def twice(self) -> Iterator[tuple[int, int]]:
        """(row, later row of the same key)."""
        self._flush()
        for path in sorted(self._folder.glob("keys.*")):
            keys = np.sort(np.fromfile(path, dtype=KEYS), order=["hash", "row"])
            for i in np.flatnonzero(keys["hash"][1:] == keys["hash"][:-1]):
                yield int(keys["row"][i]), int(keys["row"][i + 1])
