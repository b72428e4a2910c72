"""Whether pods are at work in a run folder: a file in it that says when one last was. No torch.

A cluster's queue can be asked from anywhere that it has commands; pods leave only what they write.
"""

import threading
import time

from trainer.errors import one_line
from trainer.run_folder import RunFolder

ALIVE = "pods/alive.json"
BEAT_S = 30.0
DEAD_AFTER_S = 150.0
"""Without a beat. Covers a few that storage lost, and clocks that differ."""


def is_alive(folder: RunFolder) -> bool:
    return folder.exists(ALIVE) and abs(time.time() - float(folder.read_json(ALIVE)["time"])) < DEAD_AFTER_S


class Heartbeat:
    """Writes from a thread of its own: storage that hangs must not keep signals from the ranks."""

    def __init__(self, folder: RunFolder, job: str) -> None:
        self._folder, self._job = folder, job
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._write(time.time())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        self._write(0.0)

    def _run(self) -> None:
        while not self._end.wait(BEAT_S):
            self._write(time.time())

    def _write(self, when: float) -> None:
        try:
            self._folder.write_json(ALIVE, {"job": self._job, "time": when})
        except Exception as e:  # whatever a storage client raises: the ranks say for themselves what it does to them
            print(f"warning: {self._folder.url}/{ALIVE} cannot be written ({one_line(e)})", flush=True)
