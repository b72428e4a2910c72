"""Time left and goodput, against sums made by hand."""

import pytest

from launch.job import JobSpec, record_job, update_job
from launch.runs.numbers import goodput, seconds_by_state, time_left
from launch.runs.read import Point, RunFacts, read_facts
from tests.run_folders import NOW, keep_ledger, make_run
from tests.tiny import tiny

PHASES = tiny().phases  # 8, 6 and 6 steps of 8 images; 32, 64 and 64 px


def points(*of: tuple[int, str, float]) -> list[Point]:
    return [Point(step, 0.0, 20, phase, speed, None, 0, {}) for step, phase, speed in of]


def test_time_left_takes_each_phase_at_its_own_speed() -> None:
    seen = points((8, "low_resolution", 40.0), (10, "full_resolution", 10.0), (14, "full_resolution", 10.0),
                  (16, "perceptual", 5.0))  # fmt: skip
    left = time_left(PHASES, seen)
    assert left is not None
    assert left.measured
    assert left.seconds == pytest.approx(4 * 8 / 5.0)
    left = time_left(PHASES, seen[:3])
    assert left is not None
    assert not left.measured, "the perceptual phase has not begun"
    assert left.seconds == pytest.approx(6 * 8 / 10.0), "of as many pixels as the newest phase's, so taken as fast"


def test_a_phase_to_come_is_guessed_by_its_pixels() -> None:
    assert [phase.resolution for phase in PHASES] == [16, 32, 32]
    left = time_left(PHASES, points((6, "low_resolution", 40.0)))
    assert left is not None
    assert left.seconds == pytest.approx(2 * 8 / 40.0 + 12 * 8 / (40.0 / 4))


def test_one_slow_record_does_not_count() -> None:
    slow = points((1, "low_resolution", 0.01), (2, "low_resolution", 8.0), (3, "low_resolution", 8.0))
    left = time_left(PHASES[:1], slow)
    assert left is not None
    assert left.seconds == pytest.approx(5 * 8 / 8.0)
    assert time_left(PHASES, []) is None
    assert time_left(PHASES, points((1, "low_resolution", 0.0))) is None


def facts_of(url: str) -> RunFacts:
    facts = read_facts(make_run(url, attempts=((1, 2, 3, 4), (3, 4, 5)), start=NOW - 100))
    assert facts is not None
    return facts


def test_goodput_is_the_time_of_steps_that_no_start_had_done_before(tmp_path) -> None:
    """5 steps of 2 s, two of them done twice; 7 waits of 3 s; 30 s between the starts: by hand."""
    facts = facts_of(str(tmp_path / "r"))
    assert facts.starts == 2
    assert facts.last is not None
    assert facts.last.step == 5
    told = {"productive": 10, "rework": 4, "data": 21, "down": 30}
    for now, alive, down in (
        # its last word was 35 s ago: it may yet say what it does
        (NOW, True, 30),
        (NOW + 100, True, 30 + 135),
        # no job has it, and none has recorded its end
        (NOW + 1e6, False, 30),
    ):
        found = seconds_by_state(facts, now=now, alive=alive)
        assert {state: value for state, value in found.items() if value} == pytest.approx(
            {**told, "down": down}, abs=1e-5
        )
        assert goodput(facts, now=now, alive=alive) == pytest.approx(10 / (35 + down))


def test_a_hang_is_no_time_of_the_step_that_hung(tmp_path) -> None:
    folder = make_run(str(tmp_path / "r"), attempts=((1, 2),), start=NOW - 100)
    folder.write_json("hangs/0000.json", {"time": NOW - 60, "silent_s": 31.0})
    facts = read_facts(folder)
    assert facts is not None
    found = seconds_by_state(facts, now=NOW, alive=True)
    assert {state: value for state, value in found.items() if value} == pytest.approx(
        {"data": 6, "productive": 3, "hang": 31, "down": 60}, abs=1e-5
    )


def test_the_time_between_two_jobs_does_not_count(tmp_path) -> None:
    url = str(tmp_path / "r")
    folder = make_run(url, attempts=((1, 2, 3, 4),), start=NOW - 100)
    update_job(folder, submitted_at=NOW - 110, ended={"code": 75, "why": "stopped", "time": NOW - 70})
    record_job(folder, JobSpec("demo", url, "local", cpu=True, code_dir=f"{url}/code"))
    update_job(folder, submitted_at=NOW - 30)
    folder.start_attempt({"time": NOW - 28})
    keep_ledger(folder, 1, NOW - 28, (5,))
    facts = read_facts(folder)
    assert facts is not None
    # 20 s, 10 s until the job's end, 2 s from the submission to the start, 5 s
    assert goodput(facts, now=NOW, alive=True) == pytest.approx((8 + 2) / (20 + 10 + 2 + 5))


def test_a_run_without_a_ledger_has_no_goodput(tmp_path) -> None:
    """Of an earlier version; and a damaged one is told."""
    folder = make_run(str(tmp_path / "r"), attempts=())
    facts = read_facts(folder)
    assert facts is not None
    assert (goodput(facts, now=NOW, alive=True), facts.damage) == (None, [])
    folder.write_text("goodput/0000.json", "{")
    facts = read_facts(folder)
    assert facts is not None
    assert goodput(facts, now=NOW, alive=True) is None
    assert facts.damage == ["goodput/: none of the newest records can be read"]
