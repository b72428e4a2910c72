"""Python's garbage collector, at the same steps on all ranks.

Left alone it stops a process for tens of milliseconds at a time of its own, and all other ranks wait for that one.
"""

import gc
from types import TracebackType

EVERY_STEPS = 50


class GarbageCollection:
    """Within, nothing is collected but in `end_step`. What the start has made, modules and functions for the most part, is
    looked at once and never again: `gc.freeze`."""

    def __enter__(self) -> "GarbageCollection":
        self._was_enabled, self._steps = gc.isenabled(), 0
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def end_step(self, step: int) -> None:
        if self._steps % EVERY_STEPS == 0:
            gc.collect()
        if self._steps == 0:
            gc.freeze()
        self._steps += 1
