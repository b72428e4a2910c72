"""A real SLURM takes a job's nodes away in each of its ways, and the user does: the run comes back at the very step, and what
it learns is what an undisturbed run learns."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    job_record,
    logs,
    records_by_attempt,
    restart_reasons,
    steps_by_attempt,
    submit,
    wait_for_end,
    wait_for_restarts,
    wait_for_steps,
)
from trainer.config import CODE_ROOT

# nine starts; on busy cores each takes a minute
pytestmark = pytest.mark.timeout(1800)
GRACE_S, KILL_WAIT_S, END_S = 20, 15, 600.0
INTERVAL = 25
"""Steps between checkpoints: more than the few that a test waits for, so that a stop without a save shows."""
LONG = ("--set", f"checkpoint.every_steps={INTERVAL}", "--partition", "low")
FIRST_PHASE = ("--set", "phases.low_resolution.steps=200")
STEPS = 212
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(file):
    if os.path.exists({switch!r}):
        time.sleep(600)
    fsync(file)
os.fsync = slow
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster.slurm_cluster(folder, more=f"KillWait={KILL_WAIT_S}", grace_s=GRACE_S) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "r"
    job_id = submit(cluster, run_dir, *LONG, *FIRST_PHASE)
    wait_for_end(cluster, job_id, run_dir, timeout_s=END_S)
    assert steps_by_attempt(run_dir) == [list(range(1, STEPS + 1))]
    return run_dir


def learned(record: dict[str, Any]) -> dict[str, Any]:
    """Of a step's record what does not depend on clocks: on the images it was given, and on all steps before."""
    return {name: record[name] for name in ("phase", "images", "learning_rate", "gradient_norm", "loss")}


def final_shards(run_dir: Path) -> dict[str, bytes]:
    """Weights, their average and the optimizer's state, as the last checkpoint has them."""
    [checkpoint] = (run_dir / "checkpoints").glob(f"step-{STEPS:08d}-*")
    assert (checkpoint / "COMMIT").exists()
    return {path.name: path.read_bytes() for path in checkpoint.glob("shard-*")}


def committed(run_dir: Path) -> dict[int, float]:
    """When each checkpoint that is there was, by its step; Unix time."""
    found = (run_dir / "checkpoints").glob("step-*/COMMIT")
    return {int(path.parent.name.split("-")[1]): path.stat().st_mtime for path in found}


def rank_0_ended(run_dir: Path, job_id: str, restart: int) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / f"slurm/exits/{job_id}.{restart}/rank-0.json").read_text())
    return report


def preempt(cluster: SlurmCluster) -> None:
    """By a job of the higher partition that wants both nodes; returns when it has come and gone."""
    urgent = ["sbatch", "--parsable", "--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null"]
    cluster.wait_for(cluster.run(*urgent, "--wrap", "true"), "COMPLETED", timeout_s=GRACE_S + 60)


def send_user_signal(cluster: SlurmCluster) -> None:
    """From now on a preemption sends what `--signal` names in place of SIGTERM."""
    with open(cluster.folder / "slurm.conf", "a") as conf:
        conf.write("SlurmctldParameters=preempt_send_user_signal\n")
    cluster.run("scontrol", "reconfigure")


def wait_for_hanging_save(run_dir: Path) -> None:
    """Until a checkpoint has begun that does not come to its COMMIT."""
    end = time.monotonic() + 120
    while all((path / "COMMIT").exists() for path in (run_dir / "checkpoints").glob("step-*")):
        assert time.monotonic() < end, logs(run_dir)
        time.sleep(0.1)


def nodes_that_are(cluster: SlurmCluster, *states: str) -> list[str]:
    nodes = cluster.run("sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%N %T").splitlines()
    return [node for node in nodes if any(state in node for state in states)]


def stopped_by(run_dir: Path, step: int, number: str) -> bool:
    """By this signal, which a rank other than 0 may have got first."""
    said = (run_dir / "logs/rank-0.log").read_text()
    return any(f"stopping at step {step} as asked ({reason})" in said for reason in (number, "another rank"))


def test_a_job_that_is_preempted_in_all_ways_learns_what_an_undisturbed_one_does(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, switch = tmp_path / "r", tmp_path / "disk-is-slow"
    job_id = submit(cluster, run_dir, *LONG, *FIRST_PHASE)
    (run_dir / "code/sitecustomize.py").write_text(SLOW_DISK.format(switch=str(switch)))
    starts = 0

    def start_again() -> int:
        """Once it is queued again; returns the step at which it had stopped."""
        nonlocal starts
        starts += 1
        wait_for_restarts(cluster, job_id, run_dir, starts)
        cluster.wait_for(job_id, "PENDING", timeout_s=60)
        switch.unlink(missing_ok=True)
        stopped = steps_by_attempt(run_dir)[-1][-1]
        cluster.start_now(job_id)
        wait_for_steps(cluster, job_id, run_dir, 3, attempt=starts)
        return stopped

    wait_for_steps(cluster, job_id, run_dir, 3)
    asked = time.time()
    preempt(cluster)
    saved = committed(run_dir)
    stopped = start_again()
    ended = rank_0_ended(run_dir, job_id, 0)
    received = ended["time"] - ended["stop_s"]
    assert ended["code"] == 75
    assert asked <= received <= saved[stopped] <= received + GRACE_S, "saved within the grace"
    assert stopped_by(run_dir, stopped, "SIGTERM")

    send_user_signal(cluster)
    preempt(cluster)
    stopped = start_again()
    assert stopped_by(run_dir, stopped, "SIGUSR2")

    cluster.run("scontrol", "requeue", job_id)  # SIGTERM, and KillWait to save in
    stopped = start_again()
    assert stopped_by(run_dir, stopped, "SIGTERM")

    switch.touch()
    wait_for_hanging_save(run_dir)
    before = max(committed(run_dir))
    cluster.run("scontrol", "requeue", job_id)
    lost = start_again() - before
    assert 0 < lost <= 2 * INTERVAL

    wait_for_end(cluster, job_id, run_dir, timeout_s=END_S)
    reasons = restart_reasons(run_dir)
    # a preemption is SLURM's own requeue where the batch script has not come to its end within the grace
    assert set(reasons[:2]) <= {"preempted", "requeued by SLURM"}
    assert reasons[2:] == ["requeued by SLURM", "requeued by SLURM"]
    assert not nodes_that_are(cluster, "drain", "down"), "nothing of the job lingers on them"
    attempts = records_by_attempt(run_dir)
    begun = [attempt[0]["step"] for attempt in attempts]
    ended_at = [attempt[-1]["step"] for attempt in attempts]
    assert begun == [1, *(step + 1 for step in ended_at[:3]), before + 1], (
        "every start goes on from the newest checkpoint"
    )
    assert ended_at[-1] == STEPS
    assert "set aside" not in (run_dir / "logs/rank-0.log").read_text(), "what had no COMMIT was no checkpoint"
    expected = {record["step"]: learned(record) for record in records_by_attempt(undisturbed)[0]}
    for attempt in attempts:
        steps = [record["step"] for record in attempt]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert [learned(record) for record in attempt] == [expected[step] for step in steps]
    assert final_shards(run_dir) == final_shards(undisturbed)
    assert job_record(run_dir)["ended"]["code"] == 0


def resume(cluster: SlurmCluster, run_dir: Path, *options: str) -> str:
    """Returns the new job's id."""
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "runs", "resume", str(run_dir), *options], env=cluster.environment,
        cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[1].rstrip(":")


def cancelled(cluster: SlurmCluster, job_id: str, run_dir: Path) -> int:
    """By scancel; returns the step at which it has stopped, and of which it has left a checkpoint."""
    before = cluster.field(job_id, "Restarts")
    cluster.run("scancel", job_id)
    ends = ("CANCELLED", "PENDING", "COMPLETED", "FAILED")
    assert cluster.wait_for(job_id, *ends, timeout_s=60) == "CANCELLED", logs(run_dir)
    assert cluster.field(job_id, "Restarts") == before, "not queued again"
    stopped = steps_by_attempt(run_dir)[-1][-1]
    assert max(committed(run_dir)) == stopped, "saved within KillWait"
    return stopped


def end_its_time(cluster: SlurmCluster, job_id: str, run_dir: Path) -> None:
    """Until it has been warned of its limit, and is queued again; SLURM looks at limits every 30 s."""
    started = datetime.strptime(cluster.field(job_id, "StartTime"), "%Y-%m-%dT%H:%M:%S").timestamp()
    limit_min = int((time.time() - started + 60) // 60) + 1
    cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit_min}")
    wait_for_restarts(cluster, job_id, run_dir, 1)
    cluster.wait_for(job_id, "PENDING", timeout_s=60)
    cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=60")


def test_a_cancelled_run_goes_on_with_one_node_and_again_with_two(
    cluster: SlurmCluster, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    stops = []
    job_id = submit(cluster, run_dir, *LONG, "--set", "phases.low_resolution.steps=100000")
    wait_for_steps(cluster, job_id, run_dir, 3)
    for attempt, nodes in ((1, 1), (2, 2)):
        stops.append(cancelled(cluster, job_id, run_dir))
        assert job_record(run_dir)["restarts"] == []
        job_id = resume(cluster, run_dir, "--nodes", str(nodes))
        wait_for_steps(cluster, job_id, run_dir, 20, attempt=attempt)
    end_its_time(cluster, job_id, run_dir)
    stops.append(steps_by_attempt(run_dir)[-1][-1])
    assert stopped_by(run_dir, stops[-1], "SIGUSR2")
    assert restart_reasons(run_dir) == ["preempted"]
    assert 0 < job_record(run_dir)["stop_s"] < 60
    cluster.start_now(job_id)
    wait_for_steps(cluster, job_id, run_dir, 1, attempt=3)
    stops.append(cancelled(cluster, job_id, run_dir))

    starts = [json.loads(path.read_text()) for path in sorted((run_dir / "attempts").iterdir())]
    assert [start["world_size"] for start in starts] == [2, 1, 2, 2]
    done = records_by_attempt(run_dir)
    assert [steps[-1]["step"] for steps in done] == stops
    assert [record["step"] for steps in done for record in steps] == list(range(1, stops[-1] + 1)), "every step once"
    expected = {record["step"]: record for record in records_by_attempt(undisturbed)[0]}
    assert [learned(record) for record in done[0]] == [learned(expected[record["step"]]) for record in done[0]]
    for steps in done[1:3]:
        for record in steps[:20]:
            assert record["images"] == expected[record["step"]]["images"]
            assert record["loss"] == pytest.approx(expected[record["step"]]["loss"], rel=1e-5, abs=1e-5), record["step"]
        losses = [record["loss"]["loss"] for record in steps[:20]]
        of_others = [expected[record["step"] + 1]["loss"]["loss"] for record in steps[:20]]
        assert losses != pytest.approx(of_others, rel=1e-3), "other samples would have had other losses"
