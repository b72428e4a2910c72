"""A real SLURM whose first node has a full scratch disk: the job is queued again without it and trains on the other."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_node import cluster_with_a_bad_node
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import logs, submit
from tests.tiny import TINY

SHORT = [f"phases.{phase}.steps=1" for phase in ("low_resolution", "full_resolution", "perceptual")]
END_S = 240.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    with cluster_with_a_bad_node(folder) as cluster:
        yield cluster


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_comes_back_without_the_node_that_failed_its_check(
    cluster: SlurmCluster, tmp_path: Path, launcher: str
) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--launcher", launcher, nodes=1, overrides=[*TINY, *SHORT])
    end = time.monotonic() + END_S
    while cluster.field(job_id, "ExcNodeList") != "n1":
        state = cluster.state(job_id)
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{logs(run_dir)}"
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.2)
    assert cluster.field(job_id, "Restarts") == "1"
    cluster.start_now(job_id)
    state = cluster.wait_for(job_id, "COMPLETED", "FAILED", "CANCELLED", timeout_s=END_S)
    assert state == "COMPLETED", logs(run_dir)
    assert cluster.field(job_id, "NodeList") == "n2"
    job = json.loads((run_dir / "job.json").read_text())
    assert [entry["reason"] for entry in job["restarts"]] == ["bad node"]
    assert list(job["bad_nodes"]) == ["n1"]
    records = {path.name: json.loads(path.read_text()) for path in (run_dir / "doctor").iterdir()}
    assert {name: record["code"] for name, record in records.items()} == {
        f"{job_id}.0-n1.json": 71, f"{job_id}.1-n2.json": None,
    }  # fmt: skip
    assert len(list((run_dir / "attempts").iterdir())) == 1, "nothing started on the bad node"
    assert "n1 is not fit to start on: temporary files" in (run_dir / "logs/rank-0.log").read_text()


def test_a_job_that_would_wait_for_ever_for_another_node_stops(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Two nodes are wanted, and there are two."""
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, nodes=2, overrides=[*TINY, *SHORT])
    assert cluster.wait_for(job_id, "FAILED", "COMPLETED", timeout_s=END_S) == "FAILED", logs(run_dir)
    assert cluster.field(job_id, "Restarts") == "0"
    ended = json.loads((run_dir / "job.json").read_text())["ended"]
    assert ended["code"] == 93
    assert (
        "without the nodes that failed the check before the start (n1) the partition has 1, and the job wants 2"
        in ended["why"]
    )
