"""A SLURM task and the end of the batch script, without SLURM: its variables, signals and exit codes only."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import submitit

from launch import log_tails
from launch.cancellation import ask_to_cancel
from launch.environment import Place
from launch.job import JobSpec, record_job, slurm_jobs_of, update_job
from launch.log_tails import tails_kept
from launch.slurm_job import task as slurm_task
from launch.slurm_job.reports import report_exit, warned_in_vain
from launch.slurm_job.requeued import record_requeue
from launch.slurm_job.task import CANCELLED, SignalRelay, end_of_batch, ended_before_us, run_rank
from trainer.config import CODE_ROOT
from trainer.errors import UserError
from trainer.run_folder import RunFolder
from trainer.slurm_environment import slurm_job_id

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
    end = time.monotonic() + 240
    while not (tmp_path / "attempts" / f"0000-{rank}").exists() or not (tmp_path / "metrics/0000.jsonl").exists():
        assert task.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    task.send_signal(number)
    assert task.wait(timeout=240) == code
    assert (tmp_path / f"saved-{rank}").exists()
    report = json.loads((tmp_path / f"slurm/exits/12.0/rank-{rank}.json").read_text())
    assert (report["code"], report["stop_requested"]) == (75, True)
    asked = tmp_path / "slurm/exits/12.0/asked.json"
    assert asked.exists() == (rank == 0)
    assert rank or json.loads(asked.read_text())["signal"] == signal.Signals(number).name


def test_a_rank_that_is_not_through_with_its_save_in_time_leaves_word_of_the_warning(tmp_path: Path) -> None:
    task = start_task(tmp_path, 0, "--script", "0:3:0:hang")
    end = time.monotonic() + 240
    while not (tmp_path / "hangs-0").exists():
        assert task.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    began = time.time()
    task.send_signal(signal.SIGUSR2)
    while not warned_in_vain(str(tmp_path), began - 60):
        assert time.monotonic() < end
        time.sleep(0.02)
    task.kill()
    task.wait(timeout=240)
    assert warned_in_vain(str(tmp_path), began - 60)
    assert not warned_in_vain(str(tmp_path), began + 60), "of an earlier submission"


@pytest.fixture
def handlers() -> Iterator[None]:
    """What is to happen upon signals, as before."""
    before = {number: signal.getsignal(number) for number in slurm_task.FORWARDED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_rank_has_ended_when_it_has_ended_though_storage_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last upload of its log is waited for: a stop would seem too long, and this rank not the first that fell."""
    wait_s = 2.0
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(slurm_task, "trainer_command", lambda *_: [sys.executable, "-c", "exit(7)"])
    monkeypatch.setattr(slurm_task, "tails_kept", partial(tails_kept, interval_s=60.0, last_s=wait_s))
    monkeypatch.setattr(log_tails, "RunFolder", lambda url: time.sleep(600))
    place = Place(rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="127.0.0.1", master_port=1,
                  code_dir=str(CODE_ROOT), work_dir=str(tmp_path), use_gpus=False)  # fmt: skip
    environment = cast(submitit.JobEnvironment, SimpleNamespace(job_id="12"))
    assert run_rank("memory://run", place, SignalRelay(), environment) == 7
    returned = time.time()
    assert "were not written within" in capsys.readouterr().out
    report = json.loads((tmp_path / "slurm/exits/12.0/rank-1.json").read_text())
    assert returned - report["time"] > 0.9 * wait_s


@pytest.mark.parametrize(("what", "code"), [("93", 93), ("7", 7), ("kill", 137)])
def test_a_task_ends_with_its_ranks_code(tmp_path: Path, what: str, code: int) -> None:
    assert start_task(tmp_path, 1, "--script", f"0:2:1:{what}").wait(timeout=240) == code


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


def crash_of_rank_1_and_srun_after(run_dir: str, seconds: float) -> None:
    """Rank 1 crashes; so much later rank 0, which has not begun to listen, gets SIGTERM and dies of it."""
    for rank, code in ((1, 7), (0, -signal.SIGTERM)):
        report_exit(run_dir, rank, code, stop_requested=rank == 0, stop_s=0.1 if rank == 0 else None)
    path = Path(run_dir, "slurm/exits/12.0/rank-1.json")
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "time": report["time"] - seconds}))


def test_a_crash_is_no_preemption_though_srun_ends_the_other_ranks_by_the_same_signal(run_dir: str) -> None:
    crash_of_rank_1_and_srun_after(run_dir, slurm_task.CRASH_GRACE_S)
    assert end(run_dir, 143, max_restarts=1) == 75
    assert restarts(run_dir) == ["crash"]
    assert end(run_dir, 143, max_restarts=1) == 7, "it counts"


def test_a_rank_that_falls_while_the_job_is_preempted_is_no_crash(run_dir: str) -> None:
    crash_of_rank_1_and_srun_after(run_dir, 0.5)
    assert end(run_dir, 143, max_restarts=0) == 75
    assert restarts(run_dir) == ["preempted"]


def test_a_cancelled_job_is_not_queued_again(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        report_exit(run_dir, rank, 75, stop_requested=True)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "COMPLETING")
    assert end(run_dir, 75) == CANCELLED
    assert restarts(run_dir) == []


def test_a_save_that_is_through_after_the_time_limit_counts_for_the_next_submission(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_exit(run_dir, 0, 75, stop_requested=True, stop_s=130.0)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "COMPLETING")
    assert end(run_dir, 75) == CANCELLED
    assert RunFolder(run_dir).read_json("job.json")["stop_s"] == 130.0


def test_a_job_whose_warning_is_still_on_its_way_is_queued_again(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        report_exit(run_dir, rank, 75, stop_requested=True)
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "SIGNALING")
    assert end(run_dir, 75) == 75
    assert restarts(run_dir) == ["preempted"]


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
    update_job(RunFolder(run_dir), job_id="10_2")
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


def test_what_slurm_itself_queued_again_is_recorded_by_the_next_start(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(run_dir)
    reports = Path(run_dir, "slurm/exits")
    record_requeue(folder, reports / "12.0")
    assert restarts(run_dir) == [], "the first start"
    assert slurm_task.main([run_dir, run_dir, "2", "5", "137"]) == 75
    record_requeue(folder, reports / "12.1")
    assert restarts(run_dir) == ["crash"], "the start before has recorded it itself"
    record_requeue(folder, reports / "12.2")
    assert restarts(run_dir) == ["crash", "requeued by SLURM"], "its node was lost, with the batch script"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "COMPLETING")
    assert slurm_task.main([run_dir, run_dir, "2", "5", "137"]) == CANCELLED
    for restart in (3, 4, 5):
        record_requeue(folder, reports / f"12.{restart}")
    assert restarts(run_dir)[1:] == ["requeued by SLURM"] * 4
    monkeypatch.setattr(slurm_task, "slurm_state", lambda job_id: "RUNNING")
    assert slurm_task.main([run_dir, run_dir, "2", "5", "137"]) == 75, "they say nothing of whether the run gets on"


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


def test_a_job_whose_folder_another_submission_has_taken_touches_nothing(
    run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two were submitted at the same time, and the other was recorded last."""
    folder = RunFolder(run_dir)
    report_exit(run_dir, 0, 75, stop_requested=True)
    update_job(folder, job_id="13")
    before = folder.read_json("job.json")
    assert slurm_task.has_nothing_to_do(run_dir, run_dir, "12", 0)
    assert f"job 12: {run_dir} is slurm job 13's, this one ends" in capsys.readouterr().out
    assert end(run_dir, 75) == 93
    assert folder.read_json("job.json") == before
    update_job(folder, chain=["13", "12"])
    assert not slurm_task.has_nothing_to_do(run_dir, run_dir, "12", 0), "a later job of its chain"


def test_a_job_of_an_array_is_called_as_squeue_calls_it() -> None:
    plain = {"SLURM_JOB_ID": "12"}
    assert slurm_job_id(plain) == "12"
    assert slurm_job_id({**plain, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "0"}) == "10_0"
    assert slurm_job_id({}) is None
