"""What is done to jobs of a real SLURM from a shell, by scancel and `loupe runs cancel`, and what `loupe runs` then says."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import START_S, logs, steps_in, submit, wait_for_restarts, wait_for_steps
from trainer.config import CODE_ROOT

LONG = ("--set", "phases.low_resolution.steps=100000")


def loupe(cluster: SlurmCluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", *arguments], env=cluster.environment, cwd=CODE_ROOT,
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip


def job_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "job.json").read_text()))


def last_step(run_dir: Path) -> int:
    """Of the newest start."""
    newest = sorted((run_dir / "metrics").iterdir())[-1]
    return int(steps_in(newest.read_text().splitlines())[-1])


def test_a_job_that_scancel_ends_is_cancelled_and_not_lost(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "first"
    job_id = submit(cluster, run_dir, *LONG)
    wait_for_steps(cluster, job_id, run_dir, 3)
    cluster.run("scancel", job_id)
    ended = cluster.wait_for(job_id, "CANCELLED", "PENDING", "COMPLETED", "FAILED", timeout_s=240)
    assert ended == "CANCELLED"
    assert (cluster.field(job_id, "Restarts"), job_of(run_dir)["restarts"]) == ("0", []), "it does not return"
    # the batch script says so at its end, within KillWait; where busy cores left it no time, the next look does
    end = time.monotonic() + 25
    while job_of(run_dir)["ended"] is None and time.monotonic() < end:
        time.sleep(0.5)
    loupe(cluster, "--root", str(tmp_path))
    why = job_of(run_dir)["ended"]["why"]
    assert why == f"cancelled by scancel of its job {job_id}, newest checkpoint: step {last_step(run_dir)}", logs(
        run_dir
    )
    table = loupe(cluster, "--root", str(tmp_path))
    assert "cancelled" in table.stdout
    assert table.stderr == ""
    # what its batch script had no time for is done by who looks while SLURM knows the job
    record = job_of(run_dir)
    (run_dir / "job.json").write_text(json.dumps({**record, "ended": None}))
    assert f"state:         cancelled (by scancel of its job {job_id}" in loupe(cluster, "show", str(run_dir)).stdout
    assert job_of(run_dir)["ended"]["why"] == why


def test_a_job_that_sigusr2_stops_is_said_so_and_waits(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "warned"
    job_id = submit(cluster, run_dir, *LONG)
    wait_for_steps(cluster, job_id, run_dir, 3)
    assert "state:         running" in loupe(cluster, "show", str(run_dir)).stdout
    cluster.run("scancel", "--signal=USR2", job_id)
    wait_for_restarts(cluster, job_id, run_dir, 1)
    saved = last_step(run_dir)
    log = (run_dir / "logs/rank-0.log").read_text()
    assert re.search(rf"stopping at step {saved} as asked .*\nsaved step {saved} in [\d.]+ s\n", log)
    assert "Traceback" not in log
    assert "resource_tracker" not in log
    shown = loupe(cluster, "show", str(run_dir)).stdout
    assert f"asked by SIGUSR2: its time limit, or a preemption that warns at step {saved}" in shown
    assert re.search(rf"state:         pending \(SLURM job {job_id}, BeginTime, to start 20", shown)
    assert "pending (BeginTime)" in loupe(cluster, "--root", str(tmp_path)).stdout
    for command in ("watch", "logs"):
        said = followed(cluster, command, str(run_dir), *(("--follow",) if command == "logs" else ()))
        assert f"waiting: SLURM job {job_id} is pending (BeginTime, to start 20" in said
    cluster.start_now(job_id)
    end = time.monotonic() + START_S
    while "state:         starting" not in (shown := loupe(cluster, "show", str(run_dir)).stdout):
        assert time.monotonic() < end, shown
        assert "state:         running" not in shown, "its metrics are of the start before"
    assert "speed:" not in shown
    wait_for_steps(cluster, job_id, run_dir, 2, attempt=1)
    ended = loupe(cluster, "cancel", str(run_dir), "--now")
    assert ended.returncode == 0, ended.stderr
    assert f"SLURM job {job_id} is RUNNING: its ranks are killed; waiting until its nodes are free" in ended.stdout
    newest = (run_dir / "logs/rank-0.log").read_text().rpartition("==== ")[2]
    assert "stopping at step" not in newest, "it was not asked to save"
    assert re.match(
        r"cancelled at once|cancelled, not saved, newest checkpoint: step \d+", job_of(run_dir)["ended"]["why"]
    )


def followed(cluster: SlurmCluster, *arguments: str) -> str:
    """What a command that goes on says within some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "runs", *arguments], env=cluster.environment, cwd=CODE_ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return process.communicate(timeout=25)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def test_the_runs_of_a_sweep_are_cancelled_together(cluster: SlurmCluster, tmp_path: Path) -> None:
    first = submit(cluster, tmp_path / "pair", *LONG, "--seeds", "2", nodes=1)
    runs = [tmp_path / f"pair-seed-{seed}" for seed in range(2)]
    for i, run in enumerate(runs):
        wait_for_steps(cluster, first.replace("_0", f"_{i}"), run, 3)
    said = loupe(cluster, "cancel", "pair-seed-*", "--root", str(tmp_path))
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert ["asked to save and end" in line for line in lines[:2]] == [True, True], (
        "all are asked before one is waited for"
    )
    for run in runs:
        assert job_of(run)["ended"]["why"] == f"cancelled, saved at step {last_step(run)}"
        assert f"{run}: cancelled, saved at step {last_step(run)}" in said.stdout
    again = loupe(cluster, "cancel", "pair-seed-*", "--root", str(tmp_path))
    assert again.returncode == 2
    assert "no run of such a name" in again.stderr
