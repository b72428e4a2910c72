"""A SLURM task and the end of the batch script, without SLURM: its variables, signals and exit codes only."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cancellation import ask_to_cancel
from launch.job import JobSpec, record_job, slurm_jobs_of, update_job
from launch.slurm_job import task as slurm_task
from launch.slurm_job.task import CANCELLED, end_of_batch, ended_before_us, report_exit
from trainer.errors import UserError
from trainer.run_folder import RunFolder

TASK = """
import sys, launch.slurm_job.task as slurm_task
run_dir, stand_in, *arguments = sys.argv[1:]
slurm_task.trainer_command = lambda *_: [sys.executable, stand_in, "--run-dir", run_dir, *arguments]
slurm_task.CRASH_GRACE_S = 0.1
slurm_task.SlurmTask(run_dir, run_dir, run_dir + "/code", 1, True, 0)()
"""


def start_task(run_dir: Path, rank: int, *arguments: str) -> subprocess.Popen[bytes]:
    slurm = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
             "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SUBMITIT_EXECUTOR": "slurm"}  # fmt: skip
    stand_in = str(Path(__file__).with_name("stand_in.py"))
    return subprocess.Popen(
        [sys.executable, "-c", TASK, str(run_dir), stand_in, *arguments],
        env={**os.environ, **slurm}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(("rank", "code"), [(0, 75), (1, 0)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_task_passes_the_signal_on_and_only_rank_0_says_75(tmp_path: Path, number: int, rank: int, code: int) -> None:
    task = start_task(tmp_path, rank, "--steps", "100000")
    end = time.monotonic() + 20
    while not (tmp_path / "attempts" / f"0000-{rank}").exists() or not (tmp_path / "metrics/0000.jsonl").exists():
        assert task.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    task.send_signal(number)
    assert task.wait(timeout=20) == code
    assert (tmp_path / f"saved-{rank}").exists()
    report = json.loads((tmp_path / f"slurm/exits/12.0/rank-{rank}.json").read_text())
    assert (report["code"], report["stop_requested"]) == (75, True)


@pytest.mark.parametrize(("what", "code"), [("93", 93), ("7", 7), ("kill", 137)])
def test_a_task_ends_with_its_ranks_code(tmp_path: Path, what: str, code: int) -> None:
    assert start_task(tmp_path, 1, "--script", f"0:2:1:{what}").wait(timeout=20) == code


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "RUNNING")
    folder = RunFolder(str(tmp_path))
    record_job(folder, JobSpec("demo", str(tmp_path), "slurm", code_dir="/code"), job_id="12")
    return str(tmp_path)


def end(run_dir: str, srun_code: int, *, max_restarts: int = 5) -> int:
    return end_of_batch(run_dir, run_dir, world_size=2, max_restarts=max_restarts, srun_code=srun_code)


def restarts(run_dir: str) -> list[str]:
    return [entry["reason"] for entry in RunFolder(run_dir).read_json("job.json")["restarts"]]


def test_a_preempted_job_is_queued_again_though_srun_killed_the_slower_rank(run_dir: str) -> None:
    report_exit(run_dir, 0, 75, stop_requested=True)
    assert end(run_dir, 137) == 75
    assert restarts(run_dir) == ["preempted"]


def test_a_cancelled_job_is_not_queued_again(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        report_exit(run_dir, rank, 75, stop_requested=True)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "COMPLETING")
    assert end(run_dir, 75) == CANCELLED
    assert restarts(run_dir) == []


def test_the_rank_that_knows_is_heard_over_sruns_code(run_dir: str) -> None:
    report_exit(run_dir, 1, 1, stop_requested=False)
    report_exit(run_dir, 0, 93, stop_requested=False)
    assert end(run_dir, 137) == 93


def test_a_crash_uses_up_the_budget(run_dir: str) -> None:
    report_exit(run_dir, 1, 7, stop_requested=False)
    assert end(run_dir, 137, max_restarts=1) == 75
    assert end(run_dir, 137, max_restarts=1) == 7
    assert restarts(run_dir) == ["crash"]


def test_no_word_from_any_rank_is_a_crash(run_dir: str) -> None:
    assert end(run_dir, 0, max_restarts=0) == 1
    assert end(run_dir, 9, max_restarts=0) == 9


def test_the_longest_stop_is_kept_for_the_next_submission(run_dir: str) -> None:
    report_exit(run_dir, 0, 75, stop_requested=True, stop_s=12.5)
    report_exit(run_dir, 1, 75, stop_requested=True, stop_s=3.0)
    assert end(run_dir, 75) == 75
    folder = RunFolder(run_dir)
    assert folder.read_json("job.json")["stop_s"] == 12.5
    record_job(folder, JobSpec("demo", run_dir, "slurm", code_dir="/code"), job_id="13")
    assert folder.read_json("job.json")["stop_s"] == 12.5


def test_an_arrays_job_asks_for_itself_and_not_for_the_array(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    asked: list[str] = []

    def state(job_id: str) -> str:
        asked.append(job_id)
        return "RUNNING"

    monkeypatch.setattr(slurm_task, "slurm_state", state)
    report_exit(run_dir, 0, 75, stop_requested=True)
    assert end(run_dir, 75) == 75
    assert asked == ["10_2"]


def test_the_decision_is_left_in_a_file(run_dir: str) -> None:
    report_exit(run_dir, 0, 75, stop_requested=True)
    assert slurm_task.main([run_dir, run_dir, "2", "5", "137"]) == 75
    assert Path(run_dir, "slurm/exits/12.0/decision").read_text() == "75\n"


def chain(run_dir: str, *jobs: str) -> RunFolder:
    folder = RunFolder(run_dir)
    update_job(folder, chain=list(jobs))
    return folder


def test_a_later_job_of_a_chain_takes_the_run_over_or_finds_it_ended(run_dir: str) -> None:
    folder = RunFolder(run_dir)
    assert not ended_before_us(folder, "13", is_main=True)
    assert folder.read_json("job.json")["job_id"] == "12", "not of a chain"
    chain(run_dir, "12", "13", "14")
    assert not ended_before_us(folder, "13", is_main=False)
    assert folder.read_json("job.json")["job_id"] == "12"
    assert not ended_before_us(folder, "13", is_main=True)
    job = folder.read_json("job.json")
    assert job["job_id"] == "13"
    assert slurm_jobs_of(job) == ["13", "14"]
    ask_to_cancel(folder, job)
    assert ended_before_us(folder, "14", is_main=True)
    (Path(run_dir) / "cancel.json").unlink()
    assert not ended_before_us(folder, "14", is_main=True)
    update_job(folder, ended={"code": 93})
    assert ended_before_us(folder, "14", is_main=True)


def test_a_chain_says_when_it_is_at_its_end(
    run_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chain(run_dir, "11", "12", "13")
    report_exit(run_dir, 0, 75, stop_requested=True)
    assert end(run_dir, 75) == 75
    assert "the next job of the chain goes on" in capsys.readouterr().out
    assert folder.read_json("job.json")["ended"] is None
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    report_exit(run_dir, 0, 75, stop_requested=True)
    assert end(run_dir, 75) == 75
    assert "the chain is at its end" in folder.read_json("job.json")["ended"]["why"]


def test_without_squeue_the_decision_is_made_all_the_same(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(job_id: str) -> str:
        raise UserError("squeue: not here")

    monkeypatch.setattr(slurm_task, "slurm_state", absent)
    for rank in (0, 1):
        report_exit(run_dir, rank, 75, stop_requested=True)
    assert end(run_dir, 75) == 75
