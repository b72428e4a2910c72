"""`loupe runs` and jobs of a real SLURM: their states by squeue alone, cancelling with a save, resuming."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import logs, steps_in, submit, wait_for_steps
from trainer.config import CODE_ROOT


def loupe(cluster: SlurmCluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", *arguments], env=cluster.environment, cwd=CODE_ROOT,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def states(cluster: SlurmCluster, root: Path) -> dict[str, Any]:
    result = loupe(cluster, "--root", str(root), "--json")
    assert result.returncode == 0, result.stderr
    return {run["name"]: run for run in json.loads(result.stdout)}


def test_a_job_is_shown_cancelled_with_a_save_and_resumed(cluster: SlurmCluster, tmp_path: Path) -> None:
    name, other = tmp_path / "first", tmp_path / "second"
    whole_nodes = ("--cpus-per-task", str(len(os.sched_getaffinity(0))))  # so that the second has to wait
    job_id = submit(cluster, name, "--set", "phases.low_resolution.steps=100000", *whole_nodes)
    wait_for_steps(cluster, job_id, name, 3)
    waiting = submit(cluster, other, *whole_nodes)
    lost = tmp_path / "third"
    lost.mkdir()
    for file in ("config.yaml", "job.json"):
        (lost / file).write_text((other / file).read_text().replace(f'"{waiting}"', '"99999"'))
    runs = states(cluster, tmp_path)
    assert {run: runs[run]["state"] for run in runs} == {"first": "running", "second": "pending", "third": "lost"}
    assert f"SLURM job {job_id} on n[1-2]" in runs["first"]["state_detail"]
    assert "Resources" in runs["second"]["state_detail"] or "Priority" in runs["second"]["state_detail"]
    assert runs["first"]["time_left_s"] > 60
    assert 0 < runs["first"]["goodput"] <= 1

    said = loupe(cluster, "cancel", str(other))
    assert said.returncode == 0, said.stderr
    assert f"SLURM job {waiting} is PENDING: scancel" in said.stdout
    said = loupe(cluster, "cancel", str(name))
    assert said.returncode == 0, said.stderr + logs(name)
    assert f"SLURM job {job_id} is RUNNING: asked to save and end" in said.stdout
    assert "cancelled, saved at step" in said.stdout
    record = json.loads((name / "job.json").read_text())
    assert (record["ended"]["code"], record["restarts"]) == (143, [])
    last = steps_in((name / "metrics/0000.jsonl").read_text().splitlines())[-1]
    assert f"newest checkpoint: step {last};" in said.stdout, "saved at the very step"
    assert cluster.field(job_id, "Restarts") == "0"
    time.sleep(1)
    runs = states(cluster, tmp_path)
    assert (runs["first"]["state"], runs["second"]["state"]) == ("cancelled", "cancelled")

    printed = loupe(cluster, "logs", str(name)).stdout
    assert f"slurm  | job {job_id}: cancelled, saved at step {last}" in printed
    assert f"rank 0 | stopping at step {last} as asked" in printed

    said = loupe(cluster, "resume", str(name), "--time", "30", "--dry-run")
    assert said.returncode == 0, said.stderr
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=30", f"#SBATCH --cpus-per-task={whole_nodes[1]}"):
        assert line in said.stdout
    again = loupe(cluster, "resume", str(name))
    assert again.returncode == 0, again.stderr
    assert "job " in again.stdout
    assert loupe(cluster, "resume", str(name)).stderr.startswith(f"error: {name}: in use by SLURM job ")
    assert loupe(cluster, "cancel", str(name), "--now").returncode == 0
    earlier = json.loads((name / "job.json").read_text())["earlier"]
    assert [(job["job_id"], job["ended"]["code"]) for job in earlier] == [(job_id, 143)]
