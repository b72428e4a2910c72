"""Where the time of a start goes: from the process's own start to the end of its first step. No torch."""

import os
import time
from collections.abc import Callable, Mapping

PARTS = ("import", "ranks", "data", "model", "restore", "first_batch", "compile", "first_step")
"""In their order: imports; ranks that find each other; datasets and the plan of the stream; networks, trained and frozen,
and optimizer; the checkpoint, or weights of `init_from`; data workers and the first batch; of the first step what compiled,
and the rest."""
_LONGEST_S = 3600.0


class StartTimes:
    """Laps of the training thread; after `end` nothing is counted any more."""

    def __init__(self, age_s: float = 0.0) -> None:
        """`age_s`: how long ago it began, in seconds."""
        self.begun = self._last = time.monotonic() - age_s
        """By the monotonic clock."""
        self.seconds: dict[str, float] = {}
        """By part; parts that there have been."""
        self.running = True
        self.on_end: Callable[[], None] = lambda: None

    def lap(self, part: str) -> None:
        """What has passed since the last lap, or since the beginning, belongs to `part`."""
        if not self.running:
            return
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def end(self, part: str) -> None:
        """The last lap; `on_end` is called."""
        if self.running:
            self.lap(part)
            self.running = False
            self.on_end()

    def split(self, part: str, of: str, seconds: float) -> None:
        """So much of `of` was spent on `part`."""
        if seconds > 0:
            seconds = min(seconds, self.seconds[of])
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
            self.seconds[of] -= seconds
            self.seconds = {part: self.seconds[part] for part in PARTS if part in self.seconds}


def process_age_s() -> float:
    """Seconds since this process was made, the interpreter's own start included; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # the second field, a name in brackets, may have spaces; the 22nd is the start, in ticks since boot
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
    # sandboxes count their own time since boot
    return age_s if 0 <= age_s < _LONGEST_S else 0.0


def in_words(seconds: Mapping[str, float]) -> str:
    """`14.2 s (import 6.1, ...)`; parts below 50 ms are left out."""
    parts = ", ".join(f"{part} {seconds[part]:.1f}" for part in PARTS if seconds.get(part, 0.0) >= 0.05)
    return f"{sum(seconds.values()):.1f} s" + (f" ({parts})" if parts else "")
