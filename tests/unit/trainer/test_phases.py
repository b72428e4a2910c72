"""The schedule: steps, phases and stream positions agree, at every step and at any seek; and the learning rate in it."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import PhaseConfig, RateScheduleConfig
from trainer.phases import Schedule, learning_rate, rate_factor


def phase(i: int, steps: int, batch: int, **rate: object) -> PhaseConfig:
    return PhaseConfig(
        name=f"p{i}", steps=steps, batch_size=batch, resolution=64, learning_rate=0.5,
        rate_schedule=RateScheduleConfig(**rate),  # type: ignore[arg-type]
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=5))
def test_positions_are_contiguous_and_phases_in_order(sizes: list[tuple[int, int]]) -> None:
    schedule = Schedule([phase(i, steps, batch) for i, (steps, batch) in enumerate(sizes)])
    position, expected = 0, [(i, k) for i, (steps, _) in enumerate(sizes) for k in range(steps)]
    beginnings = list(schedule.beginnings())
    assert schedule.total_steps == len(expected)
    for step, (index, step_in_phase) in enumerate(expected):
        place = schedule.at(step)
        assert (place.phase_index, place.step_in_phase, place.position) == (index, step_in_phase, position)
        assert schedule.is_last_of_phase(step) == (step_in_phase == sizes[index][0] - 1)
        if step_in_phase == 0:
            assert beginnings[index] == (step, position, schedule.phases[index])
        position += sizes[index][1]


def test_the_runs_warm_up_goes_over_the_run_not_the_phase() -> None:
    schedule = Schedule([phase(0, 3, 1), phase(1, 10, 1)])
    assert [learning_rate(schedule.at(s), s, 4) for s in (0, 1, 3, 4, 12)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert learning_rate(schedule.at(0), 0, 0) == 0.5


def test_cosine() -> None:
    p = phase(0, 21, 1, kind="cosine", final_factor=0.1)
    assert rate_factor(p, 0) == 1.0
    assert rate_factor(p, 10) == pytest.approx(0.55)
    assert rate_factor(p, 20) == pytest.approx(0.1)
    assert rate_factor(p, 5) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_warm_up_stable_decay() -> None:
    p = phase(0, 10, 1, kind="wsd", warmup_steps=2, decay_steps=4, final_factor=0.2)
    assert [rate_factor(p, s) for s in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 20), st.sampled_from(["constant", "cosine", "wsd"]))
def test_factors_stay_between_the_final_one_and_1(steps: int, warmup: int, decay: int, kind: str) -> None:
    if warmup + decay * (kind == "wsd") > steps:
        return
    p = phase(0, steps, 1, kind=kind, warmup_steps=warmup, decay_steps=decay * (kind == "wsd"))
    factors = [rate_factor(p, s) for s in range(steps)]
    assert all(0.0 <= f <= 1.0 for f in factors)
    falling = factors[warmup:]
    assert all(a >= b for a, b in pairwise(falling))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({"kind": "wsd"}, "decay_steps: 0 does not go with wsd"),
        ({"kind": "cosine", "decay_steps": 2}, "decay_steps: 2 does not go with cosine"),
        ({"kind": "wsd", "warmup_steps": 6, "decay_steps": 6}, "6 steps of warm-up and 6 of decay do not fit"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(rate, message) -> None:
    with pytest.raises(ValueError, match=message):
        phase(0, 10, 1, **rate)
