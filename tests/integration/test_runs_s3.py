"""`loupe runs` on run folders in an S3 bucket: the real client against a real server of its protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import cli
from launch.entry import run_command
from launch.job import process_start, update_job
from launch.log_tails import tails_kept
from tests.run_folders import make_run
from tests.s3_server import s3 as s3  # noqa: PLC0414  a fixture


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(cli, ["runs", *arguments], prog_name="loupe")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_runs_in_a_bucket(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{s3}/runs"
    one = make_run(f"{root}/one", attempts=((1, 2), (2, 3, 4)), checkpoint=4)
    work = tmp_path / "work"
    update_job(one, work_dir=str(work), code_dir=str(tmp_path / "code"))
    two = make_run(f"{root}/two")
    update_job(two, ended={"code": 93, "why": "no progress", "time": 0})
    two.write_text("job.json", "{")
    one.fs.pipe_file(f"{s3}/runs/not-a-run/shard.00000.mds", b"x")
    _, out, _ = call(capsys, "--root", root, "--json")
    runs = {run["name"]: run for run in json.loads(out)}
    assert set(runs) == {"one", "two"}
    assert (runs["one"]["state"], runs["one"]["step"], runs["one"]["checkpoint_step"]) == ("lost", 4, 4)
    assert runs["one"]["restarts"] == 1
    assert runs["one"]["checkpoint_time"] is not None
    assert (runs["two"]["state"], len(runs["two"]["damage"])) == ("damaged", 1)
    monkeypatch.setenv("LOUPE_RUNS", root)
    _, out, _ = call(capsys, "show", "one")
    assert "valid" in out
    assert "NOT VALID" not in out
    # what a node keeps there of its logs, which this machine cannot see
    log = tmp_path / "rank-1.log"
    log.write_text("==== 2027-01-15 08:00:00 +0000 start 0, rank 1 of 2\nhello\n")
    with tails_kept(one.url, [log]):
        pass
    code, out, err = call(capsys, "logs", "one", "--tail", "1")
    assert (code, out) == (0, "rank 1 | hello\n"), err
    assert str(work) in err
    # as soon as the launcher's own folder is seen, its whole logs are
    (work / "logs").mkdir(parents=True)
    (work / "logs/rank-0.log").write_text("whole\n")
    assert call(capsys, "logs", "one")[1:] == ("rank 0 | whole\n", "")
    code, out, err = call(capsys, "resume", "one", "--dry-run")
    assert code == 0, err
    assert f"--run-dir {one.url}" in out
    assert out.count("# rank ") == 2


def test_a_local_job_of_a_bucket_is_cancelled(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(f"{s3}/runs/three")
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(flush=True); signal.pause()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        update_job(folder, pid=supervisor.pid, pid_start=process_start(supervisor.pid))
        _, out, _ = call(capsys, "--root", f"{s3}/runs", "--json")
        assert {run["name"]: run["state"] for run in json.loads(out)}["three"] == "running"
        result, out, err = call(capsys, "cancel", folder.url, "--timeout", "240")
        assert (result, supervisor.wait(timeout=120)) == (0, 75), err
        assert "cancelled" in out
    finally:
        supervisor.kill()
        supervisor.wait()
