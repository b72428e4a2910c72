"""Chains of jobs on a real SLURM: later jobs stay off a node that was bad, and are cancelled with the run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_node import cluster_with_a_bad_node
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    job_record,
    logs,
    restart_reasons,
    steps_by_attempt,
    submit,
    wait_for_end,
    wait_for_steps,
)
from tests.tiny import TINY
from trainer.config import CODE_ROOT

SHORT = [f"phases.{phase}.steps=1" for phase in ("low_resolution", "full_resolution", "perceptual")]
LONG = ["phases.low_resolution.steps=100000"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with cluster_with_a_bad_node(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_later_jobs_of_a_chain_do_not_start_on_the_node_that_failed(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    first = submit(cluster, run_dir, "--chain", "2", nodes=1, overrides=[*TINY, *SHORT])
    jobs = job_record(run_dir)["chain"]
    assert cluster.wait_for(first, "FAILED", "COMPLETED", timeout_s=240) == "FAILED", logs(run_dir)
    assert cluster.field(first, "NodeList") == "n1"
    assert [cluster.field(job, "ExcNodeList") for job in jobs] == ["(null)", "n1", "n1"], logs(run_dir)
    wait_for_end(cluster, jobs[1], run_dir)
    wait_for_end(cluster, jobs[2], run_dir)
    assert cluster.field(jobs[1], "NodeList") == "n2"
    record = job_record(run_dir)
    assert (record["job_id"], record["ended"]["code"], list(record["bad_nodes"])) == (jobs[1], 0, ["n1"])
    assert restart_reasons(run_dir) == ["bad node"]
    assert steps_by_attempt(run_dir) == [[1, 2, 3]], "nothing started on the bad node, nor after the end"
    assert "the next job of the chain goes on, without n1" in logs(run_dir)


def test_cancelling_a_run_cancels_the_later_jobs_of_its_chain(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    first = submit(cluster, run_dir, "--chain", "2", "--exclude", "n1", nodes=1, overrides=[*TINY, *LONG])
    jobs = job_record(run_dir)["chain"]
    wait_for_steps(cluster, first, run_dir, 3)
    said = subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", "cancel", str(run_dir)], env=cluster.environment, cwd=CODE_ROOT,
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr + logs(run_dir)
    assert f"of its chain: scancel {jobs[1]} {jobs[2]}" in said.stdout
    assert f"SLURM job {first} is RUNNING: asked to save and end" in said.stdout
    (steps,) = steps_by_attempt(run_dir)
    assert f"newest checkpoint: step {steps[-1]};" in said.stdout, "saved at the very step"
    assert [cluster.state(job) for job in jobs[1:]] == ["CANCELLED"] * 2
    time.sleep(4)  # SLURM's schedulers look every two
    assert cluster.run("squeue", "--noheader") == "", "none has come up after it"
    assert len(list((run_dir / "attempts").iterdir())) == 1
    record = job_record(run_dir)
    assert (record["job_id"], record["ended"]["code"], record["restarts"]) == (first, 143, [])
