"""What the exit codes of an attempt's ranks say, and what follows."""

import signal
from pathlib import Path

import pytest

from launch.job import JobSpec, record_job
from launch.ranks import Outcome, decide, last_line, newest_step, outcome_of
from trainer.errors import ExitCode
from trainer.run_folder import RunFolder


@pytest.mark.parametrize(
    ("codes", "stop_requested", "kind", "code"),
    [
        ({0: 0, 1: 0}, False, "done", 0),
        ({0: 75, 1: 75}, False, "requeue", 75),
        ({0: 75}, True, "requeue", 75),  # srun killed the other, which had nothing left to do
        ({0: 0, 1: 75}, False, "requeue", 75),
        ({0: 1, 1: 93}, False, "stop", 93),
        ({0: 1, 1: 2}, False, "stop", 2),
        ({0: 75, 1: 1}, False, "crash", 1),
        ({0: 0}, False, "crash", 1),  # the other had to be killed
        ({0: -9, 1: 1}, False, "crash", -9),
        ({0: -signal.SIGTERM, 1: 1}, True, "requeue", 75),  # asked before the trainer listened
        ({0: -signal.SIGTERM, 1: 1}, False, "crash", -15),
        ({0: 1, 1: 1}, True, "crash", 1),
    ],
)
def test_outcomes(codes: dict[int, int], stop_requested: bool, kind: str, code: int) -> None:
    outcome = outcome_of(codes, first=0, world_size=2, stop_requested=stop_requested)
    assert (outcome.kind, outcome.code) == (kind, code)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path))
    record_job(folder, JobSpec("demo", str(tmp_path), "local", code_dir="/code"), pid=1)
    return folder


def test_preemptions_never_use_up_a_run(folder: RunFolder, tmp_path: Path) -> None:
    for _ in range(20):
        outcome = Outcome("requeue", 75, 0)
        assert decide(folder, outcome, preempted=True, max_restarts=0, log=tmp_path / "log").restart


def test_stops_without_a_newer_step_are_bounded_also_without_crashes(folder: RunFolder, tmp_path: Path) -> None:
    outcome = Outcome("requeue", 75, 0)
    decisions = [decide(folder, outcome, preempted=False, max_restarts=9, log=tmp_path / "log") for _ in range(4)]
    assert [d.restart for d in decisions] == [True, True, True, False]
    assert decisions[-1].code == 93


def test_a_newer_step_starts_the_count_anew(folder: RunFolder, tmp_path: Path) -> None:
    for step in range(6):
        folder.write_text(f"metrics/{step:04d}.jsonl", f'{{"step": {step}}}\n{{"st')
        assert newest_step(folder) == step
        assert decide(folder, Outcome("crash", 1, 0), preempted=False, max_restarts=9, log=tmp_path / "log").restart


@pytest.mark.parametrize("code", [ExitCode.HANG, -signal.SIGALRM, 128 + signal.SIGALRM])
def test_a_hang_is_a_crash_with_its_own_name(folder: RunFolder, tmp_path: Path, code: int) -> None:
    decision = decide(folder, Outcome("crash", code, 1), preempted=False, max_restarts=1, log=tmp_path / "log")
    assert decision.restart
    assert decision.why.startswith("rank 1 ended with ")
    assert [entry["reason"] for entry in folder.read_json("job.json")["restarts"]] == ["hang"]
    after = decide(folder, Outcome("crash", 1, 0), preempted=False, max_restarts=1, log=tmp_path / "log")
    assert not after.restart, "it counts against the budget"


def test_a_run_killed_by_a_signal_ends_with_the_shells_code(folder: RunFolder, tmp_path: Path) -> None:
    decision = decide(folder, Outcome("crash", -9, 0), preempted=False, max_restarts=0, log=tmp_path / "log")
    assert decision.code == 137
    assert "SIGKILL" in decision.why


def test_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "no log"
    log.write_bytes(b"x" * 100_000 + b"\nValueError: no\xff good\n\n")
    assert last_line(log) == "ValueError: no\ufffd good"
