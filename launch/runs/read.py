"""What a run folder says, read quickly: whole small files, the end of the metrics, listings. Nothing in it is trusted.

A file that is damaged, too large or not there is noted and the rest is read all the same. No torch.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.config import RunConfig
from trainer.config_text import from_yaml
from trainer.errors import UserError, one_line, storage_errors
from trainer.goodput import StartRecord, Traces, newest_record, traces_of
from trainer.run_folder import CHECKPOINTS, CONFIG, GOODPUT, JOB, SUMMARY, RunFolder, parse_json

MAX_SMALL_BYTES = 4 << 20
"""Of config.yaml, job.json and the like; a larger one is not ours."""
TAIL_BYTES = 128 << 10
"""Of the metrics: hundreds of records."""
THREADS = 16
DEADLINE_S = 60.0
"""Longest that storage may take for all folders; what has not been read by then is said to be missing."""

T = TypeVar("T")


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a run folder may raise; UserError and what json says are ValueErrors."""
    return storage_errors(ValueError, RecursionError, CheckpointError)


@dataclass(frozen=True)
class Point:
    """A record of the metrics, its types checked."""

    step: int
    time: float
    """Unix time."""
    total_steps: int
    phase: str
    images_per_s: float
    """Over the training steps of the record's interval."""
    train_seconds: float | None
    """In the steps that stand, since the run's beginning; None in records of earlier versions."""
    steps_skipped: int
    raw: dict[str, Any]


@dataclass
class RunFacts:
    """What the folder says; of the scheduler it says nothing."""

    folder: RunFolder
    name: str
    """Of the folder."""
    config: RunConfig | None = None
    job: dict[str, Any] | None = None
    starts: int = 0
    first_start: float | None = None
    """Unix time of the first attempt."""
    points: list[Point] = field(default_factory=list)
    """The end of the newest attempt's metrics that has any, oldest first."""
    points_of: int | None = None
    """Number of that attempt."""
    goodput: StartRecord | None = None
    """Of the newest start that kept a ledger."""
    goodput_traces: Traces = field(default_factory=Traces)
    """Of how that start went on."""
    finished: bool = False
    """Its trainer said that it is done."""
    checkpoint: Entry | None = None
    """The newest that is committed and not set aside."""
    checkpoint_time: float | None = None
    files: frozenset[str] = frozenset()
    """Names in the folder itself."""
    damage: list[str] = field(default_factory=list)
    """A line for each thing that cannot be read."""

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    @property
    def last_activity(self) -> float:
        """Unix time; 0 where nothing has a time."""
        job = self.job or {}
        times = [self.last.time if self.last else 0.0, self.first_start or 0.0, seconds(job.get("submitted_at")) or 0.0]
        return max([*times, self.checkpoint_time or 0.0, ended_at(job) or 0.0])


def read_facts(folder: RunFolder) -> RunFacts | None:
    """None where the folder is no run. Raises nothing that storage or a file in it can cause: that is `damage`."""
    facts = RunFacts(folder, os.path.basename(folder.url))
    try:
        facts.files = frozenset(folder.names(""))
    except read_errors() as e:
        facts.damage.append(f"cannot be listed ({one_line(e)})")
        return facts
    if not {CONFIG, JOB} & facts.files:
        return None
    for part in (_read_config, _read_job, _read_attempts, _read_metrics, _read_checkpoint, _read_goodput):
        try:
            part(facts)
        except read_errors() as e:
            facts.damage.append(one_line(e).removeprefix(f"{folder.url}/"))
    facts.finished = SUMMARY in facts.files
    return facts


def read_small(folder: RunFolder, name: str) -> str:
    """
    Raises:
        UserError: larger than any such file of ours.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    data = folder.fs.cat_file(folder.path(name), start=0, end=MAX_SMALL_BYTES + 1)
    if len(data) > MAX_SMALL_BYTES:
        raise UserError(f"{folder.url}/{name}: larger than {MAX_SMALL_BYTES} bytes, so not ours")
    return bytes(data).decode()


def read_record(folder: RunFolder, name: str) -> dict[str, Any]:
    """A small JSON object; raises what `read_errors` has, which names the file."""
    try:
        tree = parse_json(read_small(folder, name))
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f"{folder.url}/{name}: {one_line(e)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{folder.url}/{name}: not a JSON object")
    return tree


def _read_config(facts: RunFacts) -> None:
    if CONFIG not in facts.files:
        raise UserError(f"{CONFIG}: missing")
    facts.config = from_yaml(read_small(facts.folder, CONFIG), source=CONFIG)


def _read_job(facts: RunFacts) -> None:
    if JOB in facts.files:
        facts.job = read_record(facts.folder, JOB)


def _read_attempts(facts: RunFacts) -> None:
    names = [name for name in facts.folder.names("attempts") if re.fullmatch(r"\d{4,9}\.json", name)]
    facts.starts = len(names)
    if names:
        facts.first_start = seconds(read_record(facts.folder, f"attempts/{names[0]}").get("time"))


def _read_metrics(facts: RunFacts) -> None:
    names = [name for name in facts.folder.names("metrics") if name.endswith(".jsonl")]
    for name in reversed(names[-4:]):  # an attempt that died early has written no step
        facts.points, unreadable = read_points(facts.folder, f"metrics/{name}")
        if unreadable:
            facts.damage.append(f"metrics/{name}: {unreadable} unreadable line(s)")
        if facts.points:
            facts.points_of = int(re.sub(r"\D", "", name) or 0)
            return


def read_points(folder: RunFolder, name: str, *, max_bytes: int = TAIL_BYTES) -> tuple[list[Point], int]:
    """The records at the end of a metrics file, and how many of its lines are none."""
    data, begin = read_tail(folder, name, max_bytes)
    lines = data.split(b"\n")[1 if begin else 0 : -1]  # the first may have lost its head, the last is being written
    points, unreadable = [], 0
    for line in filter(None, lines):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                unreadable += 1
            elif "step" in record:  # else a note
                points.append(_point(record))
        except (ValueError, RecursionError, KeyError, TypeError):
            unreadable += 1
    return points, unreadable


def read_tail(folder: RunFolder, name: str, max_bytes: int) -> tuple[bytes, int]:
    """(the file's last bytes, where in the file they begin)."""
    size = int(folder.fs.size(folder.path(name)) or 0)
    begin = max(0, size - max_bytes)
    return (bytes(folder.fs.cat_file(folder.path(name), start=begin, end=size)) if size else b""), begin


def _point(record: dict[str, Any]) -> Point:
    train_seconds = record.get("train_seconds")
    return Point(
        step=int(record["step"]), time=float(record["time"]), total_steps=int(record["total_steps"]),
        phase=str(record["phase"]), images_per_s=float(record["images_per_s"]),
        train_seconds=None if train_seconds is None else float(train_seconds),
        steps_skipped=int(record.get("steps_skipped", 0)), raw=record,
    )  # fmt: skip


def _read_checkpoint(facts: RunFacts) -> None:
    folder = CheckpointFolder(f"{facts.folder.url}/{CHECKPOINTS}")
    committed = [entry for entry in folder.entries() if entry.committed]
    if committed:
        facts.checkpoint = committed[-1]
        facts.checkpoint_time = folder.committed_at(committed[-1].name)


def _read_goodput(facts: RunFacts) -> None:
    if GOODPUT not in facts.files:
        return
    facts.goodput = newest_record(facts.folder)
    if facts.goodput is None:
        raise UserError(f"{GOODPUT}/: none of the newest records can be read")
    seen = facts.points[-1].time if facts.points and facts.points_of == facts.goodput.start else 0.0
    facts.goodput_traces = traces_of(facts.folder, facts.goodput, job=facts.job or {}, seen=seen)


# ------------------------------------------------------------------------------------------------ values of the records


def seconds(value: Any) -> float | None:
    """A time of a record; None where there is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def ended(job: dict[str, Any] | None) -> dict[str, Any] | None:
    """`ended` of a job's record: code, why and time."""
    end = (job or {}).get("ended")
    return end if isinstance(end, dict) else None


def ended_at(job: dict[str, Any] | None) -> float | None:
    return seconds((ended(job) or {}).get("time"))


def restarts_of(job: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Restarts of a job's record, oldest first."""
    return _records_in((job or {}).get("restarts"))


def earlier_jobs(job: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What `job.json` keeps of the jobs that had the run before this one, oldest first."""
    return _records_in((job or {}).get("earlier"))


def _records_in(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------------------------- in parallel


def in_parallel(calls: Sequence[Callable[[], T]], *, deadline_s: float = DEADLINE_S) -> list[T | None]:
    """The results in order; None where one has not come within the time. What a call raises is raised here.

    Threads that a hung storage holds must not keep the command from ending, so they are daemons, which a pool's are not.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    for i in range(len(calls)):
        todo.put(i)

    def work() -> None:
        while True:
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, calls[i](), None))
            except BaseException as e:  # raised again in the caller's thread
                done.put((i, None, e))

    for _ in range(min(THREADS, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    results: list[T | None] = [None] * len(calls)
    end = time.monotonic() + deadline_s
    for _ in calls:
        try:
            i, result, error = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if error is not None:
            raise error
        results[i] = result
    return results


def read_all(folders: Sequence[RunFolder], *, deadline_s: float = DEADLINE_S) -> list[RunFacts]:
    """The runs among `folders`; one that storage does not give in time is damaged."""
    missing = object()
    calls = [lambda folder=folder: read_facts(folder) or missing for folder in folders]
    found = in_parallel(calls, deadline_s=deadline_s)
    facts = []
    for folder, result in zip(folders, found, strict=True):
        if isinstance(result, RunFacts):
            facts.append(result)
        elif result is None:
            late = RunFacts(folder, os.path.basename(folder.url))
            late.damage.append(f"not read within {deadline_s:.0f} s")
            facts.append(late)
    return facts
