"""What the training thread does, said once to all who want to know: the watchdog, which ends what takes too long, and the
ledger, which adds the time up."""

from collections.abc import Callable, Hashable

import torch

from trainer.goodput import Ledger
from trainer.watchdog import Watchdog


class DeviceWork:
    """Whether a GPU still computes what it was given before `mark`. Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        if self._event:
            self._event.record()

    def goes_on(self) -> bool:
        return self._event is not None and not self._event.query()


class Activity:
    """Each word takes a few microseconds. States: `metric_names.GOODPUT_STATES`."""

    def __init__(
        self, watchdog: Watchdog, ledger: Ledger, device: torch.device, compile_seconds: Callable[[], float] | None = None
    ) -> None:  # fmt: skip
        """`compile_seconds`: what the compiler has taken in this process so far, asked about the first steps of each kind;
        None where nothing is compiled."""
        self._watchdog, self._ledger, self._compile_seconds = watchdog, ledger, compile_seconds
        self._work = DeviceWork(device)
        self._compiled_s: float | None = None
        self._of_steps = "productive"

    def doing(self, what: str, state: str) -> None:
        """Something between two steps, in words."""
        self._ledger.enter(state)
        self._watchdog.doing(what)

    def in_step(self, what: str) -> None:
        """Something that belongs to the last step."""
        self._ledger.enter(self._of_steps)
        self._watchdog.doing(what, step=True)

    def starting_workers(self) -> None:
        """Waiting for the first batch of a loader, whose workers are being started."""
        self._ledger.enter("init")
        self._watchdog.loading(fresh=True)

    def loading(self, *, fresh: bool = False) -> None:
        """Waiting for a batch; `fresh`: workers make it anew."""
        self._work.mark()
        self._ledger.enter("data")
        self._watchdog.loading(fresh=fresh)

    def loaded(self) -> None:
        """The batch is there; are those of the other ranks? Still the state of waiting."""
        self._watchdog.loaded()

    def stepping(self, step: int, phase: int, *kind: Hashable) -> None:
        """Computing the step after `step` others; one that an earlier start, or this one before a roll back, has done is done
        again. The first of its kind in a phase may have to compile."""
        if self._work.goes_on():
            # the device had enough to do: the wait has cost nothing
            self._ledger.settle(0.0, then=self._of_steps)
        self._of_steps = "rework" if step < self._ledger.reached else "productive"
        fresh = self._watchdog.stepping(phase, *kind)
        self._compiled_s = self._compile_seconds() if fresh and self._compile_seconds else None
        self._ledger.enter(self._of_steps if self._compiled_s is None else "compile")

    def stepped(self, step: int, seconds: float) -> None:
        """The step is done: `step` of them by now, this one in so many seconds."""
        if self._compiled_s is not None:
            assert self._compile_seconds
            self._ledger.settle(self._compile_seconds() - self._compiled_s, then=self._of_steps)
            self._compiled_s = None
        self._ledger.reached = max(self._ledger.reached, step)
        self._watchdog.stepped(step, seconds)
