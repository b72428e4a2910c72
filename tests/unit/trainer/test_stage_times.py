"""The stages of a step: a line of marks without a gap."""

import pytest
import torch

from trainer.metric_names import STAGES
from trainer.stage_times import OUTSIDE, Clock, Mark, Stages, mean_of

CPU = torch.device("cpu")


class Ticks(Clock):
    """Time that passes when told."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.time = 0.0

    def now(self) -> Mark:
        return self.time


def test_stages_sum_to_the_step_and_what_is_outside_belongs_to_none() -> None:
    clock = Ticks()
    stages = Stages(CPU, clock)

    def passes(seconds: float) -> None:
        clock.time += seconds

    passes(100)  # before the first step
    stages.begin("data")
    passes(1)
    stages.enter("other")
    with stages("copy"):
        passes(2)
    passes(4)
    with stages("perceptual_loss"):
        passes(8)
        with stages("encode"):
            passes(16)
        passes(32)
    stages.enter("optimizer")
    passes(64)
    with stages("average"):
        passes(128)
    stages.end_step()
    passes(256)  # a report
    with stages("checkpoint"):
        passes(512)
    with stages(OUTSIDE):
        passes(1024)
    stages.enter("data")
    passes(2048)
    stages.end_step()

    first, second = stages.take()
    zeros = dict.fromkeys(STAGES, 0.0)
    assert first == zeros | {
        "data": 1, "copy": 2, "other": 4, "perceptual_loss": 8 + 32, "encode": 16, "optimizer": 64, "average": 128,
        "total": 255,
    }  # fmt: skip
    assert second == zeros | {"other": 256, "checkpoint": 512, "data": 2048, "total": 256 + 512 + 2048}
    assert mean_of([first, second])["data"] == (1 + 2048) / 2
    assert stages.take() == []
    assert mean_of([]) == {}


def test_a_stage_ends_with_what_fails_within() -> None:
    stages = Stages(CPU, Ticks())
    stages.begin("other")
    with pytest.raises(ZeroDivisionError), stages("forward"):
        raise ZeroDivisionError
    assert stages.now == "other"


def test_steps_that_nobody_reads_do_not_pile_up_as_marks() -> None:
    stages = Stages(CPU)
    stages.begin("data")
    for _ in range(500):
        with stages("forward"):
            pass
        stages.end_step()
    assert len(stages._unread) < 100
    steps = stages.take()
    assert len(steps) == 500
    assert all(sum(step[stage] for stage in STAGES) == pytest.approx(step["total"], abs=1e-12) for step in steps)
