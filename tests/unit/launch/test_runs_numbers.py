"""Time left and goodput, against sums made by hand."""

import pytest

from launch.job import JobSpec, record_job, update_job
from launch.runs.numbers import goodput, time_left
from launch.runs.read import Point, RunFacts, read_facts
from tests.run_folders import NOW, make_run, record
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
    assert [phase.resolution for phase in PHASES] == [32, 64, 64]
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


def test_goodput_is_the_time_of_the_steps_that_stand(tmp_path) -> None:
    """5 steps of 2 s stand, whatever was done twice, in the 100 s since the first start."""
    facts = facts_of(str(tmp_path / "r"))
    assert facts.starts == 2
    assert facts.last is not None
    assert facts.last.step == 5
    assert goodput(facts, now=NOW, alive=True) == pytest.approx(10.0 / 100.0)
    # no job has it: the clock stopped at the last record, 15 s after the second start
    assert goodput(facts, now=NOW + 1e6, alive=False) == pytest.approx(10.0 / 65.0)


def test_refused_steps_and_the_time_between_two_jobs_do_not_count(tmp_path) -> None:
    url = str(tmp_path / "r")
    folder = make_run(url, attempts=((1, 2, 3, 4),), start=NOW - 100)
    update_job(folder, submitted_at=NOW - 110, ended={"code": 75, "why": "stopped", "time": NOW - 70})
    record_job(folder, JobSpec("demo", url, "local", cpu=True, code_dir=f"{url}/code"))
    update_job(folder, submitted_at=NOW - 30)
    folder.start_attempt({"time": NOW - 28})
    writer = folder.metrics_writer(1)
    writer.write(record(10, NOW - 5, steps_skipped=1))
    writer.close()
    facts = read_facts(folder)
    assert facts is not None
    assert goodput(facts, now=NOW, alive=True) == pytest.approx(0.9 * 20.0 / (100.0 - 40.0))


def test_records_without_a_clock_have_no_goodput(tmp_path) -> None:
    folder = make_run(str(tmp_path / "r"), attempts=())
    writer = folder.metrics_writer(0)
    writer.write({name: value for name, value in record(1, NOW).items() if name != "train_seconds"})
    writer.close()
    facts = read_facts(folder)
    assert facts is not None
    assert facts.last is not None
    assert goodput(facts, now=NOW, alive=True) is None
