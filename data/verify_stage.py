"""Check a stage's output: every file that a receipt names, its size and hash, and that receipts agree with one another."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import xxhash

from data.ahead import in_order
from data.ingest.ranges import within
from data.stages.runner import done_receipts, sum_counts
from data.stages.store import SUMMARY, Json, StageStore, read_stage
from data.storage import CHUNK_BYTES, with_retries
from trainer.errors import UserError

FILE_DEADLINE_S = 3600.0
"""For one file, all attempts together."""


@dataclass
class StageReport:
    stage: str
    finished: bool
    num_files: int = 0
    num_bytes: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By pass."""
    failures: list[str] = field(default_factory=list)


def verify_stage(url: str, *, threads: int = 4, progress: Callable[[int], None] = lambda files: None) -> StageReport:
    """Read every file of a stage's output.

    Raises:
        UserError: no stage's output.
        StorageError: storage does not answer.
    """
    store = StageStore(url)
    stage = read_stage(store)
    report = StageReport(str(stage["stage"]), store.exists(SUMMARY))
    for name in stage["passes"]:
        receipts: list[Json] = []
        report.counts[name] = {}
        for (_, file), future in in_order(
            lambda job: _check(store, job[1]), _files(store, name, receipts, report), threads=threads, ahead=2 * threads
        ):
            if problem := future.result():
                report.failures.append(problem)
            report.num_files += 1
            report.num_bytes += int(file["bytes"])
            progress(report.num_files)
        report.counts[name] = dict(sum_counts(iter(receipts)))
    if report.finished:
        summary = store.read_json(SUMMARY)
        for name, counts in report.counts.items():
            if (told := summary["counts"].get(name)) is not None and told != counts:
                report.failures.append(f"{store.url}/{SUMMARY}: counts of {name} are not the sum of the receipts'")
    return report


def _files(store: StageStore, name: str, counts: list[Json], report: StageReport) -> Iterator[tuple[str, Json]]:
    for receipt in done_receipts(store, name):
        parts = receipt["parts"]
        counts.append(receipt["counts"])
        if [part["part"] for part in parts] != list(range(len(parts))):
            report.failures.append(f"{store.url}: {name} {receipt['item']}: its parts are not 0 to {len(parts) - 1}")
        if dict(sum_counts(part["counts"] for part in parts)) != receipt["counts"]:
            report.failures.append(f"{store.url}: {name} {receipt['item']}: its counts are not the sum of its parts'")
        for part in parts:
            yield from part["files"].items()


def _check(store: StageStore, file: Json) -> str | None:
    """What is wrong with a file; None: nothing."""
    name = str(file["name"])
    path = PurePosixPath(name)
    if path.parts[0] != "files" or ".." in path.parts:
        return f"{store.url}/{name}: is no name of a stage's file; this receipt is not to be trusted"

    def hashed() -> tuple[int, str]:
        hasher, num_bytes = xxhash.xxh64(), 0
        with store.fs.open(store.path(name), "rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                hasher.update(chunk)
                num_bytes += len(chunk)
        return num_bytes, hasher.hexdigest()

    def attempt(deadline: float) -> Any:
        return within(hashed, deadline - time.monotonic(), f"read {name}")

    try:
        num_bytes, digest = with_retries(attempt, f"{store.url}/{name}", FILE_DEADLINE_S)
    except FileNotFoundError:
        return f"{store.url}/{name}: is missing, though a receipt names it"
    except UserError as e:
        return str(e)
    if num_bytes != file["bytes"]:
        return f"{store.url}/{name}: has {num_bytes} bytes, its receipt says {file['bytes']}"
    if digest != file["xxh64"]:
        return f"{store.url}/{name}: its hash is not the receipt's, the file is damaged"
    return None
