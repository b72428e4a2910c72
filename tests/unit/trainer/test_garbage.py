"""Python's garbage is collected at the same steps everywhere, and by itself again afterwards."""

import gc
import weakref

import pytest

from trainer.garbage import EVERY_STEPS, GarbageCollection


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_go_every_so_many_steps_and_at_no_other_time() -> None:
    garbage = GarbageCollection()
    with garbage:
        garbage.end_step(1000)  # a resumed run's first
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        cycle = weakref.ref(Cycle())
        waste = [[] for _ in range(5000)]  # type: ignore[var-annotated]
        for part in waste:
            part.append(part)  # beyond the collector's own threshold
        for step in range(1, EVERY_STEPS):
            garbage.end_step(1000 + step)
            assert cycle() is not None
        garbage.end_step(1000 + EVERY_STEPS)
        assert cycle() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_it_is_as_before_also_after_an_error() -> None:
    garbage = GarbageCollection()
    with pytest.raises(ZeroDivisionError), garbage:
        garbage.end_step(1 // 0)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with GarbageCollection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
