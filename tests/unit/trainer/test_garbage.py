"""Python's garbage is collected at the same steps everywhere, and by itself again afterwards."""

import gc
import weakref

import pytest

from trainer.garbage import EVERY_STEPS, GarbageCollection, without_collection


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_cycles_go_every_so_many_steps_and_at_no_other_time() -> None:
    garbage = GarbageCollection()
    with garbage.held():
        garbage.end_step()
        assert gc.get_freeze_count() > 10_000
        cycle = weakref.ref(Cycle())
        waste = [[] for _ in range(5000)]  # type: ignore[var-annotated]
        for part in waste:
            part.append(part)  # beyond the collector's own threshold
        for _ in range(1, EVERY_STEPS):
            garbage.end_step()
            assert cycle() is not None
        garbage.end_step()
        assert cycle() is None
        cycle = weakref.ref(Cycle())
        with garbage.by_itself():
            assert gc.isenabled()
        assert cycle() is None
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def failing(garbage: GarbageCollection) -> None:
    with garbage.held():
        garbage.end_step()
        assert gc.get_freeze_count() > 0
        raise ZeroDivisionError


def test_it_is_as_before_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(GarbageCollection())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with GarbageCollection().held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_stays_is_not_looked_at_neither_meanwhile_nor_later() -> None:
    looked: list[str] = []

    def look(phase: str, _: object) -> None:
        looked.append(phase)

    gc.callbacks.append(look)
    try:
        with without_collection():
            kept = [[] for _ in range(5000)]  # type: ignore[var-annotated]
            for part in kept:
                part.append(part)
        assert not looked
        assert gc.isenabled()
        assert gc.get_freeze_count() > 5000
    finally:
        gc.callbacks.remove(look)
        gc.unfreeze()
