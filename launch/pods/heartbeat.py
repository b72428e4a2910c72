"""Whether pods are at work in a run folder: a file in it that says when one last was. No torch.

A cluster's queue can be asked from anywhere that it has commands; pods leave only what they write.
"""

import sys
import threading
import time
from dataclasses import dataclass

from data.deadlines import call_within
from trainer.errors import one_line
from trainer.run_folder import RunFolder

ALIVE = "pods/alive.json"
BEAT_S = 30.0
DEAD_AFTER_S = 150.0
"""Without a beat. Covers a few that storage lost, and clocks that differ."""
WRITE_S = 10.0
"""Longest wait for storage to take one."""


@dataclass(frozen=True)
class Beat:
    """The newest sign of life of a pod of rank 0."""

    job: str
    attempt: str
    """Its start; empty of a version that did not say."""
    time: float
    """Unix time; 0 when it has ended."""


def beat_of(folder: RunFolder) -> Beat | None:
    """None where no pod has left one that can be read."""
    folder.fs.invalidate_cache()
    if not folder.exists(ALIVE):
        return None
    try:
        record = folder.read_json(ALIVE)
        return Beat(str(record.get("job") or ""), str(record.get("attempt") or ""), float(record["time"]))
    except (ValueError, KeyError, TypeError) as e:  # what a pod writes is whole or absent: this is nobody's beat
        print(f"warning: {folder.url}/{ALIVE}: damaged ({one_line(e)}); taken for none", file=sys.stderr)
        return None


def newest_beat(folder: RunFolder) -> Beat | None:
    """Of a pod that is at work now."""
    beat = beat_of(folder)
    return beat if beat is not None and abs(time.time() - beat.time) < DEAD_AFTER_S else None


def is_alive(folder: RunFolder) -> bool:
    return newest_beat(folder) is not None


class Heartbeat:
    """Writes from a thread of its own: storage that hangs must not keep signals from the ranks."""

    def __init__(self, folder: RunFolder, job: str, attempt: str) -> None:
        self._folder, self._job, self._attempt = folder, job, attempt
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write(time.time())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=WRITE_S + 1)
        self._write(0.0)

    def _run(self) -> None:
        while not self._end.wait(BEAT_S):
            self._write(time.time())

    def _write(self, when: float) -> None:
        record = {"job": self._job, "attempt": self._attempt, "time": when}
        try:
            call_within(lambda: self._folder.write_json(ALIVE, record), time.monotonic() + WRITE_S, "heartbeat")
        except Exception as e:  # whatever a storage client raises: the ranks say for themselves what it does to them
            print(f"warning: {self._folder.url}/{ALIVE} cannot be written ({one_line(e)})", flush=True)
