"""On SLURM a run is found by its file in a discovery folder: while a start lives, under the job's and the nodes' names; after a
kill that left rank 0 no time it is taken back all the same."""

import json
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import START_S, logs, submit, wait_for_end, wait_for_restarts, wait_for_steps
from tests.slurm_processes import rank_of
from tests.tiny import TINY

pytestmark = pytest.mark.timeout(1200)


def found(path: Path) -> list[list[dict[str, Any]]]:
    """The groups of each file."""
    return [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]


def wait_for_file(path: Path, start: int, run_dir: Path) -> list[dict[str, Any]]:
    end = time.monotonic() + START_S
    while not (files := found(path)) or files[0][0]["labels"]["__meta_loupe_start"] != str(start):
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.1)
    assert len(files) == 1
    return files[0]


def test_a_job_is_found_while_it_runs_and_not_after_it_was_killed(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir, path = tmp_path / "r", tmp_path / "discovery"
    overrides = [*TINY, "phases.low_resolution.steps=80", "checkpoint.every_steps=4", "checkpoint.asynchronous=false"]
    job = submit(cluster, run_dir, "--discovery-dir", str(path), "--no-preflight", overrides=overrides)
    groups = wait_for_file(path, 0, run_dir)
    assert [group["labels"]["rank"] for group in groups] == ["0", "1"]
    assert {group["labels"]["job_id"] for group in groups} == {job}
    assert [group["labels"]["node"] for group in groups] == ["n1", "n2"], "as sinfo has them"
    for group in groups:
        with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=30) as answer:
            assert 'recipe="demo",start="0"' in answer.read().decode()
    wait_for_steps(cluster, job, run_dir, 8, attempt=0)
    os.kill(rank_of(cluster, job, 0).pid, signal.SIGKILL)
    wait_for_restarts(cluster, job, run_dir, 1)
    assert found(path) == [], "no start lives"
    cluster.start_now(job)
    again = wait_for_file(path, 1, run_dir)
    assert {group["labels"]["job_id"] for group in again} == {job}
    wait_for_end(cluster, job, run_dir)
    assert os.listdir(path) == []
