"""The supervisor against real processes: a stand-in for the trainer, which exits as it is told to."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from launch.console import PlainDisplay
from launch.folder_lock import LOCK, locked
from launch.job import JobSpec, check_folder, live_job, process_start, record_job
from launch.local import Supervisor
from launch.ranks import log_path
from tests.slurm_jobs import steps_in
from tests.tiny import tiny
from trainer.errors import UserError
from trainer.recipes import load
from trainer.run_folder import RunFolder

STAND_IN = Path(__file__).with_name("stand_in.py")
Run = Callable[..., tuple[int, list[str]]]


def job_record(run_dir: Path) -> dict:  # type: ignore[type-arg]
    record: dict = json.loads((run_dir / "job.json").read_text())  # type: ignore[type-arg]
    return record


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def supervise(
        *arguments: str, ranks: int = 2, max_restarts: int = 5, rehearse: int | None = None, crash_grace_s: float = 0.5
    ) -> tuple[int, list[str]]:
        spec = JobSpec("demo", str(tmp_path), "local", gpus_per_node=ranks, cpu=True, max_restarts=max_restarts,
                       code_dir=str(tmp_path / "code"), rehearse_preemption=rehearse)  # fmt: skip
        notes: list[str] = []
        folder = RunFolder(str(tmp_path))
        record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
        command = [sys.executable, str(STAND_IN), "--run-dir", str(tmp_path), *arguments]
        supervisor = Supervisor(spec, load("demo"), folder, PlainDisplay(notes.append), command=command,
                                backoff_s=0.01, crash_grace_s=crash_grace_s, poll_s=0.02)  # fmt: skip
        return supervisor.run(), notes

    return supervise


def test_a_run_that_ends_well(run: Run, tmp_path: Path) -> None:
    code, notes = run("--steps", "5")
    assert code == 0
    assert job_record(tmp_path)["ended"]["code"] == 0
    assert any(note.startswith("step 5/5") and "denoising 0.2" in note for note in notes)
    assert f"metrics:       {tmp_path}/metrics" in notes, "says where things are"
    log = log_path(str(tmp_path), 1).read_text()
    assert log.startswith("==== ")
    assert "rank 1 of 2" in log


def test_a_crash_is_answered_by_a_restart(run: Run, tmp_path: Path) -> None:
    code, notes = run("--script", "0:3:1:7")
    assert code == 0
    assert any("rank 1 ended with code 7: error: told to end with 7" in note for note in notes)
    assert [entry["reason"] for entry in job_record(tmp_path)["restarts"]] == ["crash"]
    assert log_path(str(tmp_path), 0).read_text().count("====") == 2, "logs are appended to, with a header a start"


def test_a_killed_rank_takes_the_hanging_others_with_it(run: Run) -> None:
    start = time.monotonic()
    code, notes = run("--script", "0:3:1:kill,0:4:0:hang")
    assert code == 0
    assert time.monotonic() - start < 300
    assert any("rank 1 ended with SIGKILL" in note for note in notes)


def test_the_budget_ends_a_run_that_crashes_on(run: Run, tmp_path: Path) -> None:
    code, notes = run("--script", "0:3:0:7,1:6:0:7,2:9:0:7", max_restarts=2)
    assert code == 7
    assert "budget of 2 restarts" in notes[-3] or any("budget of 2 restarts" in note for note in notes)
    assert job_record(tmp_path)["ended"]["code"] == 7


def test_the_pause_before_a_restart_grows_only_while_there_is_no_newer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JobSpec("demo", str(tmp_path), "local", cpu=True, max_restarts=9, code_dir=str(tmp_path / "code"))
    folder = RunFolder(str(tmp_path))
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    notes: list[str] = []
    # one rank without a saved step begins at 0 again: three crashes at step 3, then one that comes later
    script = "0:3:0:7,1:3:0:7,2:3:0:7,3:6:0:7"
    command = [sys.executable, str(STAND_IN), "--run-dir", str(tmp_path), "--script", script]
    supervisor = Supervisor(
        spec, load("demo"), folder, PlainDisplay(notes.append), command=command, backoff_s=1.0, poll_s=0.02
    )
    slept: list[float] = []
    monkeypatch.setattr(supervisor, "_sleep", slept.append)
    assert supervisor.run() == 0
    assert slept == [1.0, 2.0, 4.0, 1.0]
    assert [note.rpartition(" in ")[2] for note in notes if "starting again" in note] == ["1 s", "2 s", "4 s", "1 s"]


def test_restarts_without_a_newer_checkpoint_end_the_run(run: Run, tmp_path: Path) -> None:
    code, notes = run("--script", "*:3:0:7", max_restarts=100)
    assert code == 93
    assert len(list((tmp_path / "attempts").glob("*-0"))) == 4
    assert any("3 restarts have not brought it past the checkpoint of step 3" in note for note in notes)


def test_do_not_restart_is_obeyed_and_the_reason_shown(run: Run, tmp_path: Path) -> None:
    # rank 0 crashes first, since its peer is gone; the peer knows why
    code, notes = run("--script", "0:3:0:1,0:4:1:93", crash_grace_s=300.0)
    assert code == 93
    assert any("error: told to end with 93 (rank 1" in note for note in notes)
    assert job_record(tmp_path)["restarts"] == []


def test_a_trainer_that_asks_for_a_restart_gets_one(run: Run, tmp_path: Path) -> None:
    code, _ = run("--script", "0:3:0:75,0:3:1:75")
    assert code == 0
    assert [entry["reason"] for entry in job_record(tmp_path)["restarts"]] == ["asked by the trainer"]


def test_rehearsed_preemption_saves_and_goes_on(run: Run, tmp_path: Path) -> None:
    code, notes = run("--steps", "120", "--step-s", "0.02", rehearse=60)
    assert code == 0
    assert [entry["reason"] for entry in job_record(tmp_path)["restarts"]] == ["preempted"]
    assert "saved at step" in log_path(str(tmp_path), 0).read_text()
    assert "saved at step" in log_path(str(tmp_path), 1).read_text()
    first = steps_in((tmp_path / "metrics/0000.jsonl").read_text().splitlines())
    second = steps_in((tmp_path / "metrics/0001.jsonl").read_text().splitlines())
    assert first[-1] >= 60
    assert second[0] == first[-1] + 1, "goes on where it stopped"
    assert any(note == "started again: attempt 0001" for note in notes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_stop_is_passed_on_and_ends_without_restart(run: Run, tmp_path: Path, number: int) -> None:
    def stop_when_running() -> None:
        while not all((tmp_path / f"attempts/0000-{rank}").exists() for rank in range(2)):  # both handle signals
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_running)
    thread.start()
    code, notes = run("--steps", "100000")
    thread.join()
    assert code == 75
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert any("the same command goes on from here" in note for note in notes)
    assert job_record(tmp_path)["ended"]["code"] == 75


def test_a_second_ctrl_c_kills(run: Run, tmp_path: Path) -> None:
    def interrupt_twice() -> None:
        # of ranks that end by the first one the second would reach this process after the supervisor
        while len(list(tmp_path.glob("hangs-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    code, _ = run("--steps", "100000", "--script", "0:3:0:hang,0:3:1:hang")
    thread.join()
    assert code == 130


SUPERVISE = """
import os, sys
from launch.console import PlainDisplay
from launch.job import JobSpec, record_job
from launch.local import Supervisor
from trainer.recipes import load
from trainer.run_folder import RunFolder
run_dir = sys.argv[1]
spec = JobSpec("demo", run_dir, "local", gpus_per_node=2, cpu=True, code_dir=run_dir + "/code")
record_job(RunFolder(run_dir), spec)
Supervisor(spec, load("demo"), RunFolder(run_dir), PlainDisplay(), command=sys.argv[2:]).run()
"""


def test_ranks_die_with_their_supervisor(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    rank = f"import os, time; open(r'{pids}/' + str(os.getpid()), 'w').close(); time.sleep(1000)"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), sys.executable, "-c", rank])
    while len(list(pids.iterdir())) < 2:
        time.sleep(0.02)
        assert supervisor.poll() is None
    supervisor.kill()
    supervisor.wait()
    end = time.monotonic() + 120
    while any(process_start(int(path.name)) for path in pids.iterdir()):
        assert time.monotonic() < end, "a rank has outlived its supervisor"
        time.sleep(0.02)


def test_the_lock_makes_a_folder_in_use_known_and_a_dead_pid_does_not(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    spec = JobSpec("demo", str(tmp_path), "local", cpu=True, code_dir=str(tmp_path / "code"))
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    assert live_job(folder) is None, "a pid alone is no life: the lock is free"
    with locked(spec.work_dir, folder.url):
        assert str(os.getpid()) in (live_job(folder) or "")
        assert live_job(folder, have_lock=True) is None, "the lock is our own"
        with pytest.raises(UserError, match="another job"), locked(spec.work_dir, folder.url):
            pass
    assert live_job(folder) is None


def test_a_disk_without_locks_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path))
    spec = JobSpec("demo", str(tmp_path), "local", cpu=True, code_dir=str(tmp_path / "code"))
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    (tmp_path / LOCK).touch()

    def of_nfs(file: Any, operation: int) -> None:
        """There a lock is one of byte ranges, which wants a file that is open for writing."""
        fcntl.lockf(file, operation)

    monkeypatch.setattr("launch.folder_lock.fcntl.flock", of_nfs)
    assert live_job(folder) is None

    def of_lustre(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("launch.folder_lock.fcntl.flock", of_lustre)
    with pytest.raises(UserError, match="cannot be told from here"):
        live_job(folder)
    with pytest.raises(UserError, match=r"files cannot be locked there .*-o flock"), locked(spec.work_dir, folder.url):
        pass


def test_the_supervisor_goes_on_where_records_are_damaged(run: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/0000.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')  # what a full disk leaves
    code, _ = run("--script", "0:3:0:7")
    assert code == 0
    assert [entry["step"] for entry in job_record(tmp_path)["restarts"]] == [3]


def test_a_job_record_that_cannot_be_read_ends_no_run(run: Run, tmp_path: Path) -> None:
    """The rank crashes, and what it leaves of job.json is half a file; a person mends that while the next start runs."""
    whole = tmp_path / "whole.json"
    code, notes = run(
        "--script", "0:3:0:7,1:6:0:7", "--at-step", f"0:2:mv {tmp_path}/job.json {whole}; echo '{{' > {tmp_path}/job.json",
        "--at-step", f"1:4:mv {whole} {tmp_path}/job.json",
    )  # fmt: skip
    assert code == 0, notes
    assert any("/job.json (JSONDecodeError" in note for note in notes)
    restarts = job_record(tmp_path)["restarts"]
    assert [(entry["reason"], "unrecorded" in entry) for entry in restarts] == [("crash", True), ("crash", False)]


def test_a_supervisor_whose_folder_fails_for_good_gives_up_and_says_so(run: Run, tmp_path: Path) -> None:
    code, notes = run("--script", "*:3:0:7", "--at-step", f"0:2:echo '{{' > {tmp_path}/job.json")
    assert code == 93
    assert len(list((tmp_path / "attempts").glob("*-0"))) == 4
    assert any("not started again, this end cannot be put into" in note for note in notes)


def test_a_run_folder_that_nobody_answers_for_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's errors are of types of its own."""
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                        "AWS_MAX_ATTEMPTS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UserError, match=r"^--run-dir s3://b/run: cannot be looked at from here \(Could not connect"
    ) as e:
        check_folder(RunFolder("s3://b/run"), tiny(), fresh=False)
    assert "\n" not in str(e.value)
    s3fs.S3FileSystem.clear_instance_cache()
