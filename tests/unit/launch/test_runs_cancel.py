"""Cancelling a run of this machine: a real supervisor with ranks that need no torch. And what a submission is repeated with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from launch.cancellation import CANCELLED, ask_to_cancel, asked_to_cancel
from launch.cli import cli
from launch.entry import run_command
from launch.job import JobSpec, process_start, record_job, update_job
from launch.ranks import Outcome, decide
from launch.runs.resume import as_command, options_of, submission_of
from launch.slurm import main as submit
from tests.run_folders import make_run
from trainer.run_folder import RunFolder

STAND_IN = Path(__file__).with_name("stand_in.py")
SUPERVISE = """
import os, sys
from launch.console import PlainDisplay
from launch.job import JobSpec, process_start, record_job
from launch.folder_lock import locked
from launch.local import Supervisor
from trainer.recipes import load
from trainer.run_folder import RunFolder
run_dir = sys.argv[1]
spec = JobSpec("demo", run_dir, "local", gpus_per_node=2, cpu=True, code_dir=run_dir + "/code")
folder = RunFolder(run_dir)
with locked(spec.work_dir, folder.url):
    record_job(folder, spec, pid=os.getpid(), pid_start=process_start(os.getpid()))
    sys.exit(Supervisor(spec, load("demo"), folder, PlainDisplay(), command=sys.argv[2:]).run())
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, ["runs", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*script: str) -> tuple[Path, "subprocess.Popen[bytes]"]:
        run_dir = tmp_path / "r"
        make_run(str(run_dir), attempts=())
        rank = [sys.executable, str(STAND_IN), "--run-dir", str(run_dir), "--steps", "100000", *script]
        started.append(subprocess.Popen([sys.executable, "-c", SUPERVISE, str(run_dir), *rank]))
        deadline = time.monotonic() + 240
        while len(list((run_dir / "attempts").glob("0000-*"))) < 2:
            assert time.monotonic() < deadline
            assert started[0].poll() is None
            time.sleep(0.02)
        return run_dir, started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def reap(process: "subprocess.Popen[bytes]") -> None:
    """As init does for those that a shell has started: a dead child of ours would otherwise stay in the process table."""
    import threading

    threading.Thread(target=process.wait, daemon=True).start()


def test_cancel_saves_ends_and_does_not_return(supervised: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, process = supervised()
    reap(process)
    code, out, err = call(capsys, "cancel", str(run_dir), "--timeout", "240")
    assert code == 0, err
    assert (run_dir / "saved-0").exists()
    assert (run_dir / "saved-1").exists()
    assert "asked to save and end" in out
    assert "stopped after saving" in out
    assert process.poll() is not None
    runs = json.loads(call(capsys, "list", "--root", str(run_dir.parent), "--json")[1])
    assert [run["state"] for run in runs] == ["cancelled"]
    assert call(capsys, "cancel", str(run_dir))[2].startswith(f"error: {run_dir}: no job has it, it has ended")


def test_now_kills_ranks_that_do_not_listen(supervised: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, process = supervised("--script", "0:3:0:hang,0:3:1:hang")
    reap(process)
    deadline = time.monotonic() + 240
    while len(list(run_dir.glob("hangs-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    code, _, err = call(capsys, "cancel", str(run_dir), "--timeout", "1")
    assert code == 2
    assert "has not ended within 1 s" in err
    started = time.monotonic()
    code, out, err = call(capsys, "cancel", str(run_dir), "--now")
    assert code == 0, err
    assert time.monotonic() - started < 300
    assert not (run_dir / "saved-0").exists()
    assert RunFolder(str(run_dir)).read_json("job.json")["ended"] is not None
    assert "killed" in out


def test_a_process_that_is_not_the_supervisor_is_never_signalled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.folder_lock import locked

    folder = make_run(str(tmp_path / "r"))
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        update_job(folder, pid=bystander.pid, pid_start=1)
        with locked(folder.root, folder.url):
            for arguments in (["--now"], []):
                code, _, err = call(capsys, "cancel", folder.url, *arguments)
                assert code == 2
                assert f"its supervisor is not process {bystander.pid} here" in err
            update_job(folder, host="elsewhere")
            assert "its processes are on elsewhere; cancel it there" in call(capsys, "cancel", folder.url)[2]
        update_job(folder, host=socket.gethostname())
        assert "no job has it" in call(capsys, "cancel", folder.url)[2]
        assert bystander.poll() is None
        assert asked_to_cancel(folder) is None, "what is not cancelled is not marked"
    finally:
        bystander.kill()
        bystander.wait()


def test_a_cancelled_job_is_not_started_again_and_the_next_one_is(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "r"), cluster="slurm", job_id="7")
    stopped = Outcome("requeue", 75, 0)
    log = tmp_path / "none.log"
    assert decide(folder, stopped, preempted=True, max_restarts=5, log=log).restart
    ask_to_cancel(folder, folder.read_json("job.json"))
    decision = decide(folder, stopped, preempted=True, max_restarts=5, log=log)
    assert (decision.restart, decision.code) == (False, CANCELLED)
    assert folder.read_json("job.json")["ended"]["why"] == "cancelled, not saved, newest checkpoint: none"
    time.sleep(0.01)
    record_job(folder, JobSpec("demo", folder.url, "slurm", cpu=True, code_dir=f"{folder.url}/code"), job_id="8")
    assert decide(folder, stopped, preempted=True, max_restarts=5, log=log).restart, "the mark is of the job before"
    earlier = folder.read_json("job.json")["earlier"]
    assert [(job["job_id"], len(job["restarts"]), job["ended"]["code"]) for job in earlier] == [("7", 1, CANCELLED)]
    assert decide(folder, Outcome("done", 0, 0), preempted=False, max_restarts=5, log=log).code == 0


def test_a_job_whose_end_nobody_waits_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(str(tmp_path / "pods"))
    update_job(folder, cluster="kubernetes", job="demo-1")
    assert (
        "`kubectl delete` it, which lets its pods save: job.batch.volcano.sh, or jobset, demo-1"
        in call(capsys, "cancel", folder.url)[2]
    )
    (tmp_path / "pods/job.json").unlink()
    assert "there is nothing to cancel" in call(capsys, "cancel", folder.url)[2]


# ---------------------------------------------------------------------------------------------------------------- resume


def test_a_submission_is_repeated_with_its_own_options() -> None:
    with submit.make_context("submit", ["demo", "--cluster", "slurm", "--nodes", "3", "--partition", "gpu", "--cpu", "--fresh",
                                        "--set", "seed=5", "--time", "90"]) as context:  # fmt: skip
        given = options_of(context)
    assert given == {"cluster": "slurm", "nodes": 3, "partition": "gpu", "cpu": True, "time_limit": "90"}
    record = json.loads(
        json.dumps({"cluster": "slurm", "nodes": 3, "gpus_per_node": 1, "max_restarts": 5, "options": given})
    )
    again = ["r/config.yaml", "--run-dir", "r", "--nodes", "2"]
    with submit.make_context("resume", again, default_map=submission_of(record, submit)) as context:
        found = context.params
    expected = {**given, "nodes": 2, "fresh": False, "overrides": (), "recipe": "r/config.yaml", "run_dir": "r"}
    assert {name: found[name] for name in expected} == expected


def test_a_submission_is_repeated_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/l.sif").touch()
    monkeypatch.chdir(tmp_path)
    arguments = [
        "demo",
        "--cluster",
        "slurm",
        "--include",
        "notes/a.txt",
        "--include",
        "/b",
        "--container",
        "images/l.sif",
    ]
    with submit.make_context("submit", arguments) as context:
        given = options_of(context)
    assert given["includes"] == [f"{tmp_path}/notes/a.txt", "/b"]
    assert given["image"] == f"{tmp_path}/images/l.sif"
    with submit.make_context(
        "submit", ["demo", "--cluster", "slurm", "--container", "docker://team/loupe:1"]
    ) as context:
        assert options_of(context)["image"] == "docker://team/loupe:1", "no file"


@pytest.mark.parametrize(("extra", "expected"), [((), 2), (("--gpus-per-node", "4"), 4)])
def test_resume_takes_the_record_and_what_is_given_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], expected: int
) -> None:
    folder = make_run(str(tmp_path / "r"))  # 2 ranks
    code, out, err = call(capsys, "resume", folder.url, *extra, "--dry-run")
    assert code == 0, err
    assert out.count("# rank ") == expected
    assert f"--run-dir {folder.url}" in out
    assert "resuming as: loupe submit" in err


def test_resume_refuses_what_is_done_or_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.folder_lock import locked

    folder = make_run(str(tmp_path / "r"))
    update_job(folder, pid=os.getpid(), pid_start=process_start(os.getpid()))
    with locked(folder.root, folder.url):
        code, _, err = call(capsys, "resume", folder.url)
        assert code == 2
        assert "in use by process" in err
    folder.write_json("summary.json", {})
    assert "the run is done" in call(capsys, "resume", folder.url)[2]
    code, _, err = call(capsys, "resume", folder.url, "--no-such-option")
    assert code == 2


def test_what_a_record_says_is_only_taken_where_the_command_has_it() -> None:
    job = {"cluster": "local", "nodes": 2, "cpu": True, "work_dir": "/w", "code_dir": "/shared/code",
           "options": {"nodes": 4, "fresh": True, "recipe": "x", "no_such": 1, "code_dir": "code"}}  # fmt: skip
    found = submission_of(job, submit)
    assert found == {"cluster": "local", "nodes": 4, "cpu": True, "code_dir": "/shared/code"}
    assert as_command(found, submit, ["--mem", "1 G"]) == (
        "--cluster local --nodes 4 --cpu --code-dir /shared/code --mem '1 G'"
    )
    assert "code_dir" not in submission_of({"cluster": "local", "work_dir": "/w", "code_dir": "/w/code"}, submit)
    assert isinstance(submit, click.Command)
    assert signal.SIGTERM + 128 == CANCELLED
