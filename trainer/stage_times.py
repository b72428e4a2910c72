"""Where the time of a step goes: one line of marks through the loop, on the device's own clock.

Marks cut time without a gap, so a step's stages sum to the step. Nothing waits for a mark until the interval's losses are
read, for which the host waits in any case.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol

import torch

from trainer.metric_names import STAGES

Mark = float | torch.cuda.Event
OUTSIDE = "outside"
"""A stage of no step: samples, evaluations. Neither told nor in the total."""
_MOST_UNREAD = 64
"""Steps whose marks are kept unread, where the device has passed them."""


class Clock:
    """On a GPU the device's: a mark is passed when the device has done all that it was given before, so what the host waits for
    while the device has work costs nothing. On CPU the host's."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def passed(mark: Mark) -> bool:
        return isinstance(mark, float) or mark.query()

    @staticmethod
    def await_(mark: Mark) -> None:
        """Wait until the device has passed it, and so all before it."""
        if not isinstance(mark, float):
            mark.synchronize()

    @staticmethod
    def seconds(begin: Mark, end: Mark) -> float:
        """Between two marks that are passed."""
        if isinstance(begin, float):
            assert isinstance(end, float)
            return end - begin
        assert not isinstance(end, float)
        return begin.elapsed_time(end) / 1000


class Counting(Protocol):
    """Counts what is computed within a stage; see `trainer.flops`."""

    def part(self, name: str) -> AbstractContextManager[object]: ...


Annotate = Callable[[str], AbstractContextManager[object]]
"""Of a stage's name."""


class NoStages:
    """Marks that nobody reads: of a task without a trainer."""

    def __call__(self, stage: str, part: str | None = None) -> AbstractContextManager[object]:
        """Within, time belongs to `stage` of `metric_names.STAGES`. `part`: whose operations these are, of the parts of
        `loupe_step_flops`; they are counted where somebody does."""
        return nullcontext()


NO_STAGES = NoStages()


class Stages(NoStages):
    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.counting: Counting | None = None
        """Counts the operations of the parts, while it is there."""
        self._annotate: Annotate | None = None
        self._annotation: AbstractContextManager[object] | None = None
        self._clock = clock or Clock(device)
        self._stage = OUTSIDE
        self._marks: list[tuple[str, Mark]] = []
        """Of the step: a stage, and when it began."""
        self._unread: list[list[tuple[str, Mark]]] = []
        self._read: list[dict[str, float]] = []

    def __call__(self, stage: str, part: str | None = None) -> AbstractContextManager[object]:
        return _Stage(self, stage, part)

    @property
    def now(self) -> str:
        return self._stage

    def annotate(self, how: Annotate | None) -> None:
        """From now on each stage lies within a context of its own, which puts it into a trace; None: no more."""
        self._annotate = how
        self._mark_in_trace()

    def _mark_in_trace(self) -> None:
        if self._annotation:
            self._annotation.__exit__(None, None, None)
        self._annotation = self._annotate(self._stage) if self._annotate else None
        if self._annotation:
            self._annotation.__enter__()

    def enter(self, stage: str) -> None:
        """From now on, until another is entered."""
        self._stage = stage
        if self._annotation:
            self._mark_in_trace()
        self._marks.append((stage, self._clock.now()))

    def begin(self, stage: str) -> None:
        """A step begins here; what was before is of none."""
        self._marks.clear()
        self.enter(stage)

    def end_step(self) -> None:
        """The step ends, and the next one begins: what happens between both is of the next one."""
        if not self._marks:
            return
        self.enter("other")
        self._unread.append(self._marks)
        self._marks = [self._marks[-1]]
        if len(self._unread) > _MOST_UNREAD and self._clock.passed(self._unread[0][-1][1]):
            self._read.append(self._seconds(self._unread.pop(0)))

    def take(self) -> list[dict[str, float]]:
        """Seconds by stage of each step since the last take, `total` their sum. Waits for the end of the last of them."""
        if self._unread:
            self._clock.await_(self._unread[-1][-1][1])
            self._read += [self._seconds(marks) for marks in self._unread]
            self._unread.clear()
        steps, self._read = self._read, []
        return steps

    def _seconds(self, marks: list[tuple[str, Mark]]) -> dict[str, float]:
        seconds = dict.fromkeys(STAGES, 0.0)
        for (stage, begin), (_, end) in itertools.pairwise(marks):
            if stage != OUTSIDE:
                seconds[stage] += self._clock.seconds(begin, end)
        return {**seconds, "total": sum(seconds.values())}


class _Stage:
    """Between two marks; what it interrupts goes on behind it."""

    __slots__ = ("_before", "_counted", "_part", "_stage", "_stages")

    def __init__(self, stages: Stages, stage: str, part: str | None) -> None:
        self._stages, self._stage, self._part = stages, stage, part
        self._counted: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        self._before = self._stages.now
        self._stages.enter(self._stage)
        if self._part and self._stages.counting:
            self._counted = self._stages.counting.part(self._part)
            self._counted.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counted:
            self._counted.__exit__(kind, error, trace)
        self._stages.enter(self._before)


def mean_of(steps: list[dict[str, float]]) -> Mapping[str, float]:
    """Mean seconds a step, by stage."""
    return {stage: sum(step[stage] for step in steps) / len(steps) for stage in steps[0]} if steps else {}
