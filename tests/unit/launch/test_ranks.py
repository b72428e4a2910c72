"""What the exit codes of an attempt's ranks say, and what follows."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.environment import Place
from launch.job import JobSpec, record_job
from launch.ranks import (
    Decision,
    Outcome,
    decide,
    kill_ranks,
    last_line,
    log_path,
    outcome_of,
    start_rank,
    wait_for_ranks,
)
from launch.reached import Reached, reached
from trainer.errors import ExitCode
from trainer.restarts import used_of_budget
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


Ranks = dict[int, "subprocess.Popen[bytes]"]


def waited(*scripts: str, give_up: Callable[[Ranks], bool] = lambda ranks: False) -> tuple[dict[int, int], int, float]:
    """(codes, the first, seconds) of ranks that are shell scripts; none of them is left."""
    began = time.monotonic()
    processes = {
        4 + i: subprocess.Popen(["sh", "-c", script], start_new_session=True) for i, script in enumerate(scripts)
    }
    ends = wait_for_ranks(processes, give_up=lambda: give_up(processes), crash_grace_s=0.3, poll_s=0.01)
    assert all(process.poll() is not None for process in processes.values())
    assert ends.times.keys() == ends.codes.keys()
    return ends.codes, ends.first, time.monotonic() - began


def test_ranks_that_linger_are_killed_after_the_first_bad_end() -> None:
    codes, first, seconds = waited("exit 0", "sleep 600 & wait", "sleep 0.2; exit 3")
    assert (codes, first) == ({4: 0, 6: 3}, 6), "the one that was killed has no code of its own"
    assert 0.5 <= seconds < 300


def test_a_rank_that_has_saved_leaves_the_others_all_their_time() -> None:
    assert waited("exit 75", "sleep 0.8; exit 75")[0] == {4: 75, 5: 75}


def test_waiting_ends_when_the_launcher_says_so() -> None:
    codes, first, seconds = waited("exit 0", "sleep 600", give_up=lambda ranks: ranks[4].returncode is not None)
    assert (codes, first) == ({4: 0}, 4)
    assert seconds < 300


def test_a_rank_that_does_not_die_holds_nobody_up() -> None:
    """As one that a hung disk or driver holds does: here the child of a shell that another session's leader keeps."""

    class Held(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            assert timeout is not None, "a wait without an end"
            time.sleep(min(timeout, 0.05))
            raise subprocess.TimeoutExpired("held", timeout)

    held, other = (
        Held(["sleep", "600"], start_new_session=True),
        subprocess.Popen(["sleep", "600"], start_new_session=True),
    )
    began = time.monotonic()
    assert kill_ranks({0: held, 1: other}, within_s=0.5) == (0,)
    assert time.monotonic() - began < 300
    subprocess.Popen.wait(held, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path))
    record_job(folder, JobSpec("demo", str(tmp_path), "local", code_dir="/code"), pid=1)
    return folder


def test_preemptions_never_use_up_a_run(folder: RunFolder, tmp_path: Path) -> None:
    for _ in range(20):
        outcome = Outcome("requeue", 75, 0)
        assert decide(folder, outcome, preempted=True, max_restarts=0, log=tmp_path / "log").restart


def test_stops_without_a_newer_checkpoint_are_bounded_also_without_crashes(folder: RunFolder, tmp_path: Path) -> None:
    outcome = Outcome("requeue", 75, 0)
    decisions = [decide(folder, outcome, preempted=False, max_restarts=9, log=tmp_path / "log") for _ in range(4)]
    assert [d.restart for d in decisions] == [True, True, True, False]
    assert decisions[-1].code == 93
    assert decisions[-1].why.endswith("3 restarts have not brought it to its first checkpoint")


def crash(folder: RunFolder, *, max_restarts: int = 9) -> Decision:
    return decide(
        folder, Outcome("crash", 1, 0), preempted=False, max_restarts=max_restarts, log=Path(folder.root, "log")
    )


def trained(folder: RunFolder, start: int, *, step: int, checkpoint: int | None, hours: float = 0.0) -> None:
    """What a start leaves in the run folder; its last line is cut short."""
    record = json.dumps({"step": step, "train_seconds": 3600 * hours})
    folder.write_text(f"metrics/{start:04d}.jsonl", f'{{"note": "x"}}\n{record}\n{{"st')
    if checkpoint is not None:
        folder.write_text(f"checkpoints/step-{checkpoint:08d}-00000000/COMMIT", "")


def test_a_newer_checkpoint_starts_the_count_anew(folder: RunFolder) -> None:
    for start in range(6):
        trained(folder, start, step=10 * start + 5, checkpoint=10 * start)
        assert reached(folder) == Reached(10 * start + 5, 10 * start, 0.0)
        assert crash(folder).restart


def test_newer_steps_that_no_checkpoint_keeps_are_no_progress(folder: RunFolder) -> None:
    decisions = []
    for start in range(4):
        trained(folder, start, step=100 + start, checkpoint=90)
        decisions.append(crash(folder))
    assert [decision.restart for decision in decisions] == [True, True, True, False]
    assert decisions[-1].code == 93
    assert decisions[-1].why.endswith("3 restarts have not brought it past the checkpoint of step 90")


def test_a_checkpoint_without_commit_or_set_aside_is_none(folder: RunFolder) -> None:
    trained(folder, 0, step=30, checkpoint=10)
    folder.write_text("checkpoints/step-00000020-00000000/manifest.json", "{}")
    folder.write_text("checkpoints/step-00000030-00000000/COMMIT", "")
    folder.write_text("checkpoints/step-00000030-00000000/SET-ASIDE.json", "{}")
    assert reached(folder).checkpoint == 10


def test_a_run_of_months_is_not_ended_by_all_the_crashes_that_it_has_seen(folder: RunFolder) -> None:
    for start in range(30):
        trained(folder, start, step=10_000 * start, checkpoint=10_000 * start, hours=5 * start)
        assert crash(folder, max_restarts=5).restart, start
    assert len(folder.read_json("job.json")["restarts"]) == 30


def test_crashes_within_a_day_of_training_use_up_the_budget(folder: RunFolder) -> None:
    for start in range(3):
        trained(folder, start, step=100 * start, checkpoint=100 * start, hours=100 + 7.9 * start)
        assert crash(folder, max_restarts=3).restart
    trained(folder, 3, step=300, checkpoint=300, hours=123.9)
    restarts = folder.read_json("job.json")["restarts"]
    assert used_of_budget(restarts, 3600 * 123.9) == 3
    assert used_of_budget(restarts, 3600 * 124.1) == 2, "the first was a day of training ago"
    end = crash(folder, max_restarts=3)
    assert not end.restart
    assert "the budget of 3 restarts is spent" in end.why


def test_how_far_a_long_run_has_come_is_read_from_the_end_of_its_metrics(folder: RunFolder) -> None:
    """And from what the restarts say, of the starts before the newest few."""
    line = json.dumps({"step": 7, "filler": "x" * 200})
    folder.write_text("metrics/0000.jsonl", f"{line}\n" * 20_000 + '{"step": 8, "train_seconds": 5}\n')
    read: list[int] = []
    cat = folder.fs.cat_file

    def counted(path: str, **of: Any) -> bytes:
        data: bytes = cat(path, **of)
        read.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.fs, "cat_file", counted)
        assert reached(folder) == Reached(8, -1, 5.0)
    assert sum(read) <= 64 << 10
    for start in range(1, 9):
        folder.write_text(f"metrics/{start:04d}.jsonl", "")
    assert reached(folder, [{"step": 8, "reason": "crash"}]).step == 8


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
    place = Place(
        rank=1, world_size=2, local_rank=0, local_world_size=1, master_addr="", master_port=1,
        code_dir="", work_dir=str(tmp_path),
    )  # fmt: skip
    assert start_rank(["true"], place, attempt="job 7").wait() == 0
    assert last_line(log_path(str(tmp_path), 1)) == "nothing said since its start"
