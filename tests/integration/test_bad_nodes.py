"""A real SLURM whose first node has a full scratch disk: the job is queued again without it and trains on the other."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.tiny import TINY
from trainer.config import CODE_ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]
SHORT = [f"phases.{phase}.steps=1" for phase in ("low_resolution", "full_resolution", "perceptual")]
END_S = 240.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    """Each node has a scratch disk of its own, which SLURM's prolog names to the tasks; that of n1 has no room."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm_cluster.slurm_cluster(folder) as cluster:
        scratch = tempfile.mkdtemp(prefix="scratch-")  # a short path: sockets are made there
        for node in ("n1", "n2"):
            Path(scratch, node).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", f"{scratch}/n1"], check=True, timeout=20)
        prolog = folder / "prolog.sh"
        prolog.write_text(f"#!/bin/sh\necho export TMPDIR={scratch}/$SLURMD_NODENAME\n")
        prolog.chmod(0o755)
        with open(folder / "slurm.conf", "a") as conf:
            conf.write(f"TaskProlog={prolog}\n")
        cluster.run("scontrol", "reconfigure")
        try:
            yield cluster
        finally:
            subprocess.run(["umount", "--lazy", f"{scratch}/n1"], check=True, timeout=20)
            shutil.rmtree(scratch)


def submit(cluster: SlurmCluster, run_dir: Path, *arguments: str) -> str:
    settings = [word for override in [*TINY, *SHORT] for word in ("--set", override)]
    result = subprocess.run(
        [
            sys.executable, str(CODE_ROOT / "launch/slurm.py"), "demo", "--cluster", "slurm", "--cpu", *settings,
            "--run-dir", str(run_dir), *arguments,
        ],
        env=cluster.environment, cwd=run_dir.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[1].rstrip(":")


def logs(run_dir: Path) -> str:
    paths = [*sorted((run_dir / "slurm").glob("*.out")), *sorted((run_dir / "logs").glob("*"))]
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in paths)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_job_comes_back_without_the_node_that_failed_its_check(
    cluster: SlurmCluster, tmp_path: Path, launcher: str
) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--launcher", launcher)
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
