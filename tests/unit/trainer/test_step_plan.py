"""What a roll back has passed over: which images come then."""

import pytest

from data.plan import SampleRef
from tests.tiny import tiny
from trainer.step_plan import StepPlanner


def planner() -> StepPlanner:
    """8 steps of one dataset, 6 of another, 6 of both; batches of 8 images."""
    config = tiny(
        "data.datasets={a: {url: a}, b: {url: b}}",
        "phases.low_resolution.data_mix={a: 1}",
        "phases.full_resolution.data_mix={b: 1}",
    )
    return StepPlanner(config, {"a": [500], "b": [500]})


def images(planner: StepPlanner, step: int) -> tuple[SampleRef, ...]:
    plan = planner.plan(step)
    return planner.refs(plan.position, plan.phase.batch_size)


@pytest.mark.parametrize("step", [5, 8, 10])  # within a phase, and to its first step
def test_after_a_roll_back_come_the_images_after_those_passed_over(step: int) -> None:
    before, after = planner(), planner().passing_over([(step, 2 * 8)])
    for undisturbed in range(step):
        assert images(after, undisturbed) == images(before, undisturbed)
    assert images(after, step) == images(before, step + 2)
    assert after.plan(19).position == before.plan(19).position + 16


def test_a_later_phase_loses_nothing_to_an_earlier_ones_roll_back() -> None:
    before, after = planner(), planner().passing_over([(5, 2 * 8)])
    assert [images(after, step) for step in range(8, 14)] == [images(before, step) for step in range(8, 14)]
    assert {ref.dataset for step in range(8) for ref in images(after, step)} == {"a"}
