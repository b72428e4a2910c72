"""Python's garbage collector, at the same steps on all ranks.

Left alone it stops a process for tens of milliseconds at a time of its own, and all other ranks wait for that one.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 50


@contextmanager
def without_collection() -> Iterator[None]:
    """For what makes many objects that stay, as imports do: nothing looks at them, neither meanwhile nor later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class GarbageCollection:
    """Nothing is collected within `held` but in `end_step`. What the start has made, modules and functions for the most part,
    is looked at once and never again: `gc.freeze`."""

    def __init__(self) -> None:
        self._steps = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        was_enabled, self._steps = gc.isenabled(), 0
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            if was_enabled:
                gc.enable()

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Within `held`, where no step waits: what takes long may leave much."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
            gc.collect()

    def end_step(self) -> None:
        if self._steps % EVERY_STEPS == 0:
            gc.collect()
        if self._steps == 0:
            gc.freeze()
        self._steps += 1
