"""Real jobs in ways that their commands and ranks are seldom met: a rank that falls while others still start, a submission from
within an array's job, the end of a batch script beside a step that does not end."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from launch.slurm_job.container import ONE_TASK
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    call,
    job_record,
    logs,
    restart_reasons,
    steps_by_attempt,
    submit,
    wait_for_restarts,
)
from tests.slurm_processes import wait_until_gone
from tests.tiny import TINY
from trainer.config import CODE_ROOT

# on busy cores a start takes a minute
pytestmark = pytest.mark.timeout(900)

FALLS_EARLY = """
import os, sys, time
if "trainer.train" in sys.orig_argv:
    if os.environ["RANK"] == "1":
        print("ImportError: libfoo.so: a node without its packages", flush=True)
        os._exit(1)
    time.sleep(60)
"""
NEVER_STOPS = """
import signal, sys
if "trainer.train" in sys.orig_argv:
    install = signal.signal
    for number in (signal.SIGTERM, signal.SIGUSR2):
        install(number, signal.SIG_IGN)
    signal.signal = lambda number, handler: None if number in (signal.SIGTERM, signal.SIGUSR2) else install(number, handler)
"""
"""As a rank whose save takes too long."""


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_rank_that_falls_while_others_start_is_a_crash_and_no_preemption(
    cluster: SlurmCluster, tmp_path: Path, launcher: str
) -> None:
    """Whoever starts the ranks ends the others by SIGTERM, which is what preempts."""
    run_dir = tmp_path / "r"
    hold = cluster.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    options = ["--no-preflight", "--launcher", launcher, "--gpus-per-node", "2", "--max-restarts", "1"]
    job_id = submit(cluster, run_dir, *options, nodes=1)
    (run_dir / "code/sitecustomize.py").write_text(FALLS_EARLY)
    cluster.run("scancel", hold)
    wait_for_restarts(cluster, job_id, run_dir, 1)
    assert [(e["reason"], e["code"], e["rank"]) for e in job_record(run_dir)["restarts"]] == [("crash", 1, 1)]
    cluster.start_now(job_id)
    assert cluster.wait_for(job_id, "FAILED", "COMPLETED", timeout_s=300) == "FAILED", "the budget holds"
    assert "libfoo.so" in job_record(run_dir)["ended"]["why"], logs(run_dir)


def test_jobs_submitted_from_within_an_arrays_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    loupe = [sys.executable, "-m", "launch.cli"]
    settings = [word for override in TINY for word in ("--set", override)]
    training = [
        *loupe, "submit", "demo", "--cluster", "slurm", "--nodes", "1", "--cpu", "--no-preflight", *settings,
        "--run-dir", str(run_dir),
    ]  # fmt: skip
    other = [*loupe, "job", "--name", "inner", "--no-copy", "--", "env"]
    outer = tmp_path / "outer.sh"
    # a restart of ours, too: its number must not become the other's
    outer.write_text(f"#!/bin/bash\nexport SLURM_RESTART_COUNT=3\n{shlex.join(training)}\n{shlex.join(other)}\n")
    array = cluster.run(
        "sbatch", "--parsable", "--array=7", f"--chdir={tmp_path}", "--output=outer.log",
        f"--export=ALL,PYTHONPATH={CODE_ROOT}", str(outer),
    )  # fmt: skip
    assert cluster.wait_for(f"{array}_7", "COMPLETED", "FAILED", timeout_s=200) == "COMPLETED"
    said = (tmp_path / "outer.log").read_text()
    first, inner = (line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("job "))
    assert cluster.wait_for(f"{inner}_0", "COMPLETED", "FAILED", timeout_s=200) == "COMPLETED", said
    found = dict(
        line.split("=", 1) for line in (tmp_path / f"inner-{inner}_0.log").read_text().splitlines() if "=" in line
    )
    assert (found["SLURM_ARRAY_JOB_ID"], found["SLURM_ARRAY_TASK_ID"]) == (inner, "0")
    assert found.get("SLURM_RESTART_COUNT", "0") == "0"
    assert cluster.wait_for(first, "COMPLETED", "FAILED", timeout_s=300) == "COMPLETED", logs(run_dir)
    assert job_record(run_dir)["job_id"] == first
    assert restart_reasons(run_dir) == []
    assert [attempt[-1] for attempt in steps_by_attempt(run_dir)] == [20]
    assert (run_dir / f"slurm/exits/{first}.0/decision").read_text() == "0\n"


def test_the_end_of_a_batch_script_waits_for_no_step(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A step whose process cannot be killed keeps the job's cores."""
    script = tmp_path / "job.sh"
    end = shlex.join([*ONE_TASK, "echo", "decided"])
    script.write_text(
        f"#!/bin/bash\nsrun --ntasks-per-node=1 bash -c 'touch held; sleep 90' &\n"
        f"until [ -e held ]; do sleep 0.2; done\ntimeout 30 {end}\n"
    )
    job_id = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", f"--chdir={tmp_path}", "--output=log", str(script)
    )
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED", timeout_s=120) == "COMPLETED", (tmp_path / "log").read_text()
    assert "decided" in (tmp_path / "log").read_text()


def test_a_save_that_does_not_fit_before_the_time_limit_is_remembered(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    hold = cluster.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    options = ["--no-preflight", "--time", "2", "--signal-delay", "60"]
    overrides = [*TINY, "phases.low_resolution.steps=100000"]
    job_id = submit(cluster, run_dir, *options, nodes=1, overrides=overrides)
    (run_dir / "code/sitecustomize.py").write_text(NEVER_STOPS)
    cluster.run("scancel", hold)
    state = cluster.wait_for(job_id, "TIMEOUT", "FAILED", "COMPLETED", timeout_s=400)
    assert state == "TIMEOUT", logs(run_dir)
    wait_until_gone(cluster, job_id, timeout_s=60)
    asked = json.loads((run_dir / f"slurm/exits/{job_id}.0/asked.json").read_text())
    assert asked["signal"] == "SIGUSR2"
    result = call(cluster, run_dir, *options, nodes=1, overrides=overrides)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "--signal-delay 60: the last save did not fit into 60 s before the time limit; give 120" in result.stderr
