"""The demo, small, as a job of a real SLURM with two nodes: submitted by our command, preempted by SLURM itself."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.stages.store import StageStore
from launch.slurm_job.array import ArrayOptions, submit_array
from tests import slurm_cluster
from tests.counting_stage import CountingStage, expected, published
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    START_S,
    job_record,
    refused,
    restart_reasons,
    steps_by_attempt,
    submit,
    wait_for_end,
    wait_for_restarts,
    wait_for_steps,
)

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_a_job_completes_on_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir)
    assert f"in use by SLURM job {job_id}" in refused(cluster, run_dir)
    wait_for_end(cluster, job_id, run_dir)
    assert steps_by_attempt(run_dir) == [list(range(1, 21))]
    assert job_record(run_dir)["ended"]["code"] == 0
    attempt = json.loads((run_dir / "attempts/0000.json").read_text())
    assert (attempt["world_size"], attempt["job_id"]) == (2, job_id)


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_loses_no_step(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--partition", "low", "--set", "phases.low_resolution.steps=250")
    wait_for_steps(cluster, job_id, run_dir, 5)
    other = ["sbatch", "--parsable", "--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null"]
    other_id = cluster.run(*other, "--wrap", "sleep 1")
    cluster.wait_for(other_id, "RUNNING", "COMPLETED", timeout_s=240)
    wait_for_restarts(cluster, job_id, run_dir, 1)
    stopped_at = steps_by_attempt(run_dir)[0][-1]
    assert stopped_at < 262
    cluster.start_now(job_id)
    wait_for_end(cluster, job_id, run_dir)
    assert restart_reasons(run_dir) == ["preempted"]
    first, second = steps_by_attempt(run_dir)
    assert [*first, *second] == list(range(1, 263)), "every step once"


def test_a_job_that_slurm_would_not_take_is_refused_before_anything_is_written(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    error = refused(cluster, tmp_path / "r", "--partition", "nowhere")
    assert error == "error: --partition nowhere: not on this cluster, which has high, low\n"
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------------ data stages

STAGE_PROGRAM = """
import sys
from data.stages.runner import Stopped
from data.stages.workers import run_workers
from tests.counting_stage import CountingStage
if __name__ == "__main__":
    print("begins", flush=True)
    try:
        run_workers(CountingStage(items=6, samples=40, part=5, seconds=0.1), sys.argv[1], workers=1)
    except Stopped:
        sys.exit(75)
"""


@pytest.mark.slow
def test_an_array_shares_a_stage_and_a_stopped_job_returns(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "stage.py"  # a file: spawned workers import it
    program.write_text(STAGE_PROGRAM)
    out = StageStore(str(tmp_path / "out"))
    command = [sys.executable, str(program), out.url]
    job_id = submit_array(command, name="stage", options=ArrayOptions(2, partition="low"))
    first = f"{job_id}_0"
    end = time.monotonic() + START_S
    while not out.names("work/count/parts"):
        assert time.monotonic() < end, _stage_logs(tmp_path)
        time.sleep(0.1)
    cluster.run("scancel", "--signal", "TERM", first)
    while cluster.field(first, "Restarts") != "1":
        assert time.monotonic() < end, _stage_logs(tmp_path)
        time.sleep(0.2)
    cluster.start_now(first)
    for index in range(2):
        state = cluster.wait_for(f"{job_id}_{index}", "COMPLETED", "FAILED", "CANCELLED", timeout_s=START_S)
        facts = cluster.run("scontrol", "show", "job", str(job_id))
        assert state == "COMPLETED", f"{facts}\n{_stage_logs(tmp_path)}\n{cluster.logs()}"
    assert published(out) == expected(CountingStage(items=6, samples=40))
    assert (tmp_path / f"stage-{job_id}_0.log").read_text().count("begins\n") == 2, "the start before has its log still"


def _stage_logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("stage-*.log")))
