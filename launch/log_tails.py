"""The ends of the ranks' logs, kept in a remote run folder: nodes and pods go, and their disks with them. No torch.

`logs/rank-N.log` there begins with a line that says from which byte of the log on it is, and holds the end of it. Written
every minute while the log grows, and when the rank has ended. It serves people: nothing that runs depends on it, so what
storage refuses is said once in the launcher's own output and tried again.
"""

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import one_line
from trainer.run_folder import RunFolder

TAIL_BYTES = 256 << 10
INTERVAL_S = 60.0
LAST_S = 20.0
"""Longest that a rank's end waits for the last upload."""
FIRST_LINE = re.compile(rb"^==== from byte (\d{1,18}) of the log\n")


@contextmanager
def tails_kept(
    run_dir: str, logs: Sequence[Path], *, interval_s: float = INTERVAL_S, last_s: float = LAST_S, of_start: str = ""
) -> Iterator[None]:
    """Within, the ends of `logs` are kept in `logs/` of a remote run folder; where that is on a disk, they lie there anyway.

    Args:
        of_start: stands in the names, as in rank-0.20260131-120000.log, where each start has logs of its own.
    """
    if "://" not in run_dir or run_dir.startswith(("file://", "local://")):
        yield
        return
    keeper = _Keeper(run_dir, logs, interval_s, of_start)
    keeper.start()
    try:
        yield
    finally:
        keeper.finish(last_s)


class _Keeper(threading.Thread):
    """A daemon: storage that hangs must not keep a job from ending."""

    def __init__(self, run_dir: str, logs: Sequence[Path], interval_s: float, of_start: str) -> None:
        super().__init__(daemon=True, name="log tails")
        self._run_dir, self._logs, self._interval_s, self._of_start = run_dir, list(logs), interval_s, of_start
        self._ended = threading.Event()
        self._uploaded: dict[Path, int] = {}
        self._complaint: str | None = None

    def run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._upload()
        self._upload()

    def finish(self, timeout_s: float) -> None:
        self._ended.set()
        self.join(timeout_s)
        if self.is_alive():
            print(
                f"warning: {self._run_dir}/logs: the ends of the logs were not written within {timeout_s:.0f} s",
                flush=True,
            )

    def _upload(self) -> None:
        for path in self._logs:
            try:
                size = os.stat(path).st_size
                if size != self._uploaded.get(path):
                    name = f"{path.stem}.{self._of_start}{path.suffix}" if self._of_start else path.name
                    RunFolder(self._run_dir).write_bytes(f"logs/{name}", tail_of(path))
                    self._uploaded[path] = size
            except FileNotFoundError:
                continue  # it has not begun
            except Exception as e:  # whatever a storage client raises; a log must not end a run
                complaint = f"{self._run_dir}/logs/{path.name}: cannot be written ({one_line(e)})"
                if complaint != self._complaint:
                    self._complaint = complaint
                    print(f"warning: {complaint}", flush=True)


def tail_of(path: Path) -> bytes:
    """The log's end, under a line that says where it begins; from the beginning of a line on, unless one is very long."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = max(0, size - TAIL_BYTES)
        file.seek(begin)
        data = file.read(size - begin)
    if begin:
        cut = data.find(b"\n") + 1
        begin, data = begin + cut, data[cut:]
    return b"==== from byte %d of the log\n" % begin + data


def split_tail(data: bytes) -> tuple[int, bytes]:
    """(where in the log it begins, the log's bytes) of what `tail_of` made; (0, data) of a whole log."""
    match = FIRST_LINE.match(data)
    return (int(match[1]), data[match.end() :]) if match else (0, data)
