"""A job of a real SLURM whose run folder is on S3: 503s, storage that hangs and comes back, storage that stays away."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_checkpoint_faults import END_S, LONGER, STEPS, hold, weights
from tests.cluster.test_checkpoint_faults import undisturbed as undisturbed  # noqa: PLC0414  a fixture
from tests.faulty_proxy import Fault, Proxy
from tests.s3_server import BUCKET, faulty_s3
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import LIVE_STATES, logs, records_by_attempt, submit, wait_for_end, wait_for_restarts
from tests.tiny import TINY
from trainer.config import CODE_ROOT
from trainer.run_folder import RunFolder

WATCHED = (*LONGER, "watchdog={factor: 10, min_s: 15, first_step_s: 240, between_steps_s: 15}")
IMPATIENT = """
import sys
if "launch.slurm_job.task" in sys.orig_argv or "submitit.core._submit" in sys.orig_argv:
    from launch.slurm_job import unrecorded
    unrecorded.ANSWER_S = 5.0
"""
"""`sitecustomize` of the job's own copy of the code: two minutes at each start and end would be the test's."""
HUNG = Fault("hang", part="/", methods=("GET", "PUT", "POST", "HEAD", "DELETE"))
URL = f"s3://{BUCKET}/runs/one"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


def wait_for_commit(cluster: SlurmCluster, job_id: str, work_dir: Path, proxy: Proxy, step: int) -> None:
    """Until storage has been given COMMIT of this step's checkpoint or of a later one."""
    end = time.monotonic() + END_S
    while not any(
        method == "PUT" and path.endswith("/COMMIT") and int(path.split("/step-")[1][:8]) >= step
        for method, path in list(proxy.requests)
    ):
        assert cluster.state(job_id) in LIVE_STATES, logs(work_dir)
        assert time.monotonic() < end, logs(work_dir)
        time.sleep(0.05)


@pytest.mark.timeout(1800)
def test_s3_that_refuses_hangs_and_stays_away(
    cluster: SlurmCluster, undisturbed: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = [[(r["step"], r["loss"]) for r in attempt] for attempt in records_by_attempt(undisturbed)]

    monkeypatch.delenv("AWS_MAX_ATTEMPTS")  # the client's own patience, as in a real job
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    cluster = dataclasses.replace(cluster, environment={**cluster.environment, **aws})
    code, work = tmp_path / "code", tmp_path / "code-work"
    waits_for = hold(cluster)
    proxy.faults = [
        Fault("503", part="config.yaml", methods=("PUT",), times=1),
        Fault("503", part=".safetensors", methods=("PUT",), times=3),
        Fault("503", part="/COMMIT", methods=("PUT",), times=1),
    ]
    job_id = submit(cluster, URL, "--code-dir", str(code), "--after", f"any:{waits_for}", overrides=[*TINY, *WATCHED])
    (code / "sitecustomize.py").write_text(IMPATIENT)
    cluster.run("scancel", waits_for)
    wait_for_commit(cluster, job_id, work, proxy, 10)
    assert [fault.happened for fault in proxy.faults] == [1, 3, 1]

    # storage hangs while the job trains, and is back for the next start
    proxy.faults = [HUNG]
    wait_for_restarts(cluster, job_id, work, 1, timeout_s=END_S)
    assert json.loads((work / f"slurm/exits/{job_id}.0/unrecorded.json").read_text())["reason"] == "hang"
    proxy.faults = [Fault("503", part=".safetensors", methods=("GET",), times=2)]
    committed = newest_commit()
    cluster.start_now(job_id)
    wait_for_commit(cluster, job_id, work, proxy, committed + 10)
    assert proxy.faults[0].happened == 2
    assert [entry["reason"] for entry in RunFolder(URL).read_json("job.json")["restarts"]] == ["hang"], "put in later"

    # and then it stays away: nothing can be started, and the job says so and ends
    proxy.faults = [HUNG]
    for restart in (2, 3, 4):
        wait_for_restarts(cluster, job_id, work, restart, timeout_s=END_S)
        cluster.start_now(job_id)
    assert cluster.wait_for(job_id, "FAILED", "COMPLETED", "CANCELLED", timeout_s=END_S) == "FAILED", logs(work)
    assert cluster.field(job_id, "ExitCode") == "93:0"
    said = (work / f"slurm/{job_id}_0_log.out").read_text().splitlines()[-1]
    assert "not started again, the run folder does not answer (TimeoutError" in said
    assert "nothing was started: TimeoutError: to read" in said

    proxy.faults = []
    committed = newest_commit()
    resumed = subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", "resume", URL], env=cluster.environment, cwd=CODE_ROOT,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    job_id = RunFolder(URL).read_json("job.json")["job_id"]
    wait_for_end(cluster, job_id, work, timeout_s=END_S)

    said = (work / "logs/rank-0.log").read_text()
    assert f"resumed from {URL}/checkpoints/step-{committed:08d}-" in said
    assert "set aside" not in said
    folder = RunFolder(URL)
    assert [(r["step"], r["loss"]) for r in folder.metrics()] == expected
    assert remote_weights() == weights(undisturbed)


def newest_commit() -> int:
    folder = RunFolder(URL)
    return max(
        int(name.split("-")[1]) for name in folder.names("checkpoints") if folder.exists(f"checkpoints/{name}/COMMIT")
    )


def remote_weights() -> dict[str, bytes]:
    folder = RunFolder(URL)
    [last] = [name for name in folder.names("checkpoints") if name.startswith(f"step-{STEPS:08d}-")]
    shards = [name for name in folder.names(f"checkpoints/{last}") if name.endswith(".safetensors")]
    return {name: folder.fs.cat_file(folder.path(f"checkpoints/{last}/{name}")) for name in shards}
