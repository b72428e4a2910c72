"""A clock for retries: pauses pass at once, and calls have as much real time as they need.

monkeypatch.setattr("data.storage.time", SkippingClock())
"""

import time


class SkippingClock:
    """In place of a module's `time`. A deadline by this clock is a real one that is later by what has been slept."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped_s

    def sleep(self, seconds: float) -> None:
        self.skipped_s += seconds
