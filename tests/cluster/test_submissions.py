"""Who has a run folder: two submissions at the same time, a second cluster, a job that is held while it is to be cancelled."""

import subprocess
import sys
import threading
from pathlib import Path

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import START_S, call, job_record, records_by_attempt, submit, wait_for_steps
from tests.tiny import TINY
from trainer.config import CODE_ROOT

LONG = (*TINY, "phases.low_resolution.steps=4000", "checkpoint.every_steps=1000")


def in_the_queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format", "%i").split()


def cancel(cluster: SlurmCluster, run_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", "cancel", str(run_dir), *arguments],
        env=cluster.environment, cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=START_S,
    )  # fmt: skip


def test_of_two_submissions_at_once_one_gets_the_folder_also_on_two_clusters(
    cluster: SlurmCluster, tmp_path: Path, tmp_path_factory: object
) -> None:
    run_dir = tmp_path / "both"
    held = cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "--wrap", "sleep 600", "--output", "/dev/null")
    results: list[subprocess.CompletedProcess[str]] = []
    both = [
        threading.Thread(
            target=lambda: results.append(call(cluster, run_dir, "--no-preflight", nodes=1, overrides=LONG))
        )
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(result.returncode for result in results) == [0, 2], results
    said = next(result.stderr for result in results if result.returncode)
    assert "another job has just taken it" in said or "in use by SLURM job" in said
    record = job_record(run_dir)
    assert [job for job in in_the_queue(cluster) if job != held] == [record["job_id"]]
    assert (record["slurm_cluster"], record["job_name"]) == ("test", "demo")
    (tmp_path / "other").mkdir()
    with slurm_cluster.slurm_cluster(tmp_path / "other", more="ClusterName=other") as other:
        there = call(other, run_dir, "--no-preflight", nodes=1, overrides=LONG)
        assert there.returncode == 2, there.stdout
        assert (
            f"SLURM job {record['job_id']} of cluster test has it, which cannot be asked from here, cluster other"
            in there.stderr
        )
        assert in_the_queue(other) == []
        refused = cancel(other, run_dir)
        assert refused.returncode == 2
        assert "is of cluster test; cancel it from a node of that" in refused.stderr
    cluster.run("scancel", record["job_id"], held)


def test_a_held_job_is_not_taken_for_one_that_waits_in_the_queue(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "held"
    job_id = submit(cluster, run_dir, "--no-preflight", nodes=1, overrides=LONG)
    wait_for_steps(cluster, job_id, run_dir, 20)
    cluster.run("scontrol", "suspend", job_id)
    cluster.wait_for(job_id, "SUSPENDED", timeout_s=30)
    first = cancel(cluster, run_dir, "--timeout", "5")
    assert first.returncode == 2, first.stdout
    assert f"job {job_id} is SUSPENDED: it saves when it goes on" in first.stdout
    assert f"SLURM job {job_id} is held, and nobody has asked it to save yet" in first.stderr
    assert cluster.state(job_id) == "SUSPENDED", "its steps are not thrown away"
    resume = threading.Timer(15.0, lambda: cluster.run("scontrol", "resume", job_id))
    resume.start()
    second = cancel(cluster, run_dir, "--timeout", "200")
    assert second.returncode == 0, second.stderr
    assert f"job {job_id} is RUNNING: asked to save and end" in second.stdout
    last = records_by_attempt(run_dir)[-1][-1]["step"]
    assert list((run_dir / "checkpoints").glob(f"step-{last:08d}-*/COMMIT")), "of the very last step"
