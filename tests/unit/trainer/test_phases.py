"""The schedule: steps, phases and stream positions agree, at every step and at any seek."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.config import PhaseConfig
from trainer.phases import Schedule, learning_rate


def phase(i: int, steps: int, batch: int) -> PhaseConfig:
    return PhaseConfig(name=f"p{i}", steps=steps, batch_size=batch, resolution=64, learning_rate=0.5)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=5))
def test_positions_are_contiguous_and_phases_in_order(sizes: list[tuple[int, int]]) -> None:
    schedule = Schedule([phase(i, steps, batch) for i, (steps, batch) in enumerate(sizes)])
    position, expected = 0, [(i, k) for i, (steps, _) in enumerate(sizes) for k in range(steps)]
    assert schedule.total_steps == len(expected)
    for step, (index, step_in_phase) in enumerate(expected):
        place = schedule.at(step)
        assert (place.phase_index, place.step_in_phase, place.position) == (index, step_in_phase, position)
        assert schedule.images_before(step) == position
        assert schedule.is_last_of_phase(step) == (step_in_phase == sizes[index][0] - 1)
        if step_in_phase == 0:
            assert schedule.first_position(index) == position
        position += sizes[index][1]
    assert schedule.images_before(schedule.total_steps) == schedule.total_images == position


def test_learning_rate_warms_up_over_the_run_not_the_phase() -> None:
    p = phase(0, 10, 1)
    assert [learning_rate(p, step, 4) for step in (0, 1, 3, 4, 100)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert learning_rate(p, 0, 0) == 0.5
