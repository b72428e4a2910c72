"""Real jobs whose ranks are killed or stopped and whose nodes are lost, one fault after the other: each time the job comes back
by itself from the newest checkpoint, and its losses are those of a run that nothing has struck, bit by bit."""

import json
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.slurm_jobs import (
    START_S,
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
from tests.slurm_processes import (
    Process,
    kill_all,
    processes_of,
    rank_of,
    strike_node,
    wait_for_node,
    wait_for_rank,
    wait_until_gone,
)
from tests.tiny import TINY

# on busy cores a start takes a minute
pytestmark = pytest.mark.timeout(1800)

STEPS, INTERVAL = 160, 10
STRUCK_AFTER = INTERVAL + INTERVAL // 2
"""Steps of a start before it is struck: it has saved a checkpoint of its own, and loses half an interval and more."""
WATCHDOG = "{factor: 10, min_s: 5, first_step_s: 90, between_steps_s: 90}"
OVERRIDES = [
    *TINY,
    f"phases=[{{name: only, steps: {STEPS}, resolution: 32, batch_size: 8, learning_rate: 1e-3}}]",
    f"checkpoint.every_steps={INTERVAL}",
    # what is lost is exact then: a save in the background is done some steps after its own
    "checkpoint.asynchronous=false",
    f"watchdog={WATCHDOG}",
    # else the wait for a batch has a deadline of its own, which the watchdog leaves to it
    "data.num_workers=0",
]
LOST_NODE_S = 10
"""Without an answer for so long, a node is down."""
END_S = 120.0
"""Longest from a fault to the job's requeue: a watchdog's limit, the patience with other ranks, KillWait, on busy cores."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    more = f"SlurmdTimeout={LOST_NODE_S}"
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm"), more=more) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Each step's figures of a job that nothing strikes."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "r"
    job_id = submit(cluster, run_dir, "--no-preflight", overrides=OVERRIDES)
    wait_for_end(cluster, job_id, run_dir, timeout_s=2 * START_S)
    [attempt] = records_by_attempt(run_dir)
    return {record["step"]: figures(record) for record in attempt}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the time it took. Floats in JSON are exact."""
    return {name: record[name] for name in ("images", "learning_rate", "gradient_norm", "update_ratio", "loss")}


def check_against(undisturbed: dict[int, dict[str, Any]], run_dir: Path) -> None:
    """Each start goes on at most an interval before the end of the one before, and all their figures are the undisturbed
    run's."""
    starts = records_by_attempt(run_dir)
    assert undisturbed.keys() == set(range(1, STEPS + 1))
    for before, after in pairwise(starts):
        lost = before[-1]["step"] - (after[0]["step"] - 1)
        assert 0 <= lost <= INTERVAL, steps_by_attempt(run_dir)
    for number, start in enumerate(starts):
        steps = [record["step"] for record in start]
        assert steps == list(range(steps[0], steps[-1] + 1)), f"start {number}"
        for record in start:
            assert figures(record) == undisturbed[record["step"]], f"start {number}, step {record['step']}"
    assert starts[-1][-1]["step"] == STEPS


def wait_for_requeue(cluster: SlurmCluster, job_id: str, run_dir: Path, restarts: int) -> None:
    """And until the last start's processes have ended."""
    wait_for_restarts(cluster, job_id, run_dir, restarts, timeout_s=END_S)
    wait_until_gone(cluster, job_id, timeout_s=END_S)


def test_a_job_comes_back_from_ranks_killed_and_stopped_and_from_lost_nodes(
    cluster: SlurmCluster, undisturbed: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--no-preflight", overrides=OVERRIDES)
    faults = [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
    for start, (rank, number) in enumerate(faults):
        wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER, attempt=start)
        rank_of(cluster, job_id, rank).kill(number)
        wait_for_requeue(cluster, job_id, run_dir, start + 1)
        cluster.start_now(job_id)
    assert restart_reasons(run_dir) == ["crash", "crash", "hang"]
    killed = job_record(run_dir)["restarts"]
    assert [(entry["rank"], entry["code"]) for entry in killed[:2]] == [(1, -9), (0, -9)], "the rank that was struck"
    hang = json.loads((run_dir / "hangs/0002.json").read_text())
    assert (hang["rank"], hang["unanswered"]) == (0, [1])
    assert killed[2]["time"] - hang["time"] < END_S

    # n2 falls silent: its connections stay, so that nobody hears of it but SLURM, whose job cannot start without it
    wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER, attempt=3)
    silent = strike_node(cluster, job_id, "n2", signal.SIGSTOP)
    try:
        wait_for_restarts(cluster, job_id, run_dir, 4, timeout_s=END_S)
        assert cluster.node_state("n2").startswith("down")
    finally:
        kill_all(silent)
    wait_until_gone(cluster, job_id, timeout_s=END_S)
    cluster.start_now(job_id)
    time.sleep(3)
    assert (cluster.state(job_id), cluster.node_state("n1")) == ("PENDING", "idle"), (
        "it waits for as many nodes as asked"
    )
    cluster.start_node("n2")
    wait_for_node(cluster, "n2", lambda state: state in ("idle", "allocated"), timeout_s=60)

    # n1 loses its power, with rank 0 and the batch script: nothing of ours is left that could decide
    wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER, attempt=4)
    strike_node(cluster, job_id, "n1", signal.SIGKILL)
    wait_for_requeue(cluster, job_id, run_dir, 5)
    cluster.start_node("n1")
    wait_for_node(cluster, "n1", lambda state: state in ("idle", "allocated"), timeout_s=60)
    cluster.start_now(job_id)

    wait_for_end(cluster, job_id, run_dir, timeout_s=2 * START_S)
    assert restart_reasons(run_dir) == ["crash", "crash", "hang", "requeued by SLURM", "requeued by SLURM"]
    assert len(records_by_attempt(run_dir)) == 6
    check_against(undisturbed, run_dir)
    assert job_record(run_dir)["ended"]["code"] == 0
    assert not processes_of(cluster, job_id)


def test_ranks_of_torchrun_killed_one_by_one_and_with_their_agent(
    cluster: SlurmCluster, undisturbed: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--launcher", "torchrun", "--no-preflight", overrides=OVERRIDES)
    wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER, attempt=0)
    rank_of(cluster, job_id, 1).kill()
    wait_for_requeue(cluster, job_id, run_dir, 1)
    cluster.start_now(job_id)

    wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER, attempt=1)
    agent(cluster, job_id, "n2").kill()
    end = time.monotonic() + 20
    while any(process.runs("trainer.train") for process in processes_of(cluster, job_id, node="n2")):
        assert time.monotonic() < end, "the agent's ranks outlive it"
        time.sleep(0.1)
    wait_for_requeue(cluster, job_id, run_dir, 2)
    cluster.start_now(job_id)

    # USR2, of which torchrun dies by default and leaves its workers behind: here all ranks save
    wait_for_steps(cluster, job_id, run_dir, 5, attempt=2)
    for node in ("n1", "n2"):
        agent(cluster, job_id, node).kill(signal.SIGUSR2)
    wait_for_requeue(cluster, job_id, run_dir, 3)
    cluster.start_now(job_id)
    wait_for_end(cluster, job_id, run_dir, timeout_s=2 * START_S)
    reasons = restart_reasons(run_dir)
    # An agent that ends before the other has SLURM end the step; where the job starts again at once, as here, that may reach
    # its new step, which has the same number, and so the job comes back once more.
    assert reasons[:2] == ["crash", "crash"], logs(run_dir)
    assert set(reasons[2:]) == {"preempted"}, logs(run_dir)
    third, fourth, *_ = (steps for steps in steps_by_attempt(run_dir)[2:] if steps)
    assert fourth[0] == third[-1] + 1, "saved at the very step"
    check_against(undisturbed, run_dir)
    assert not processes_of(cluster, job_id)


def agent(cluster: SlurmCluster, job_id: str, node: str) -> Process:
    """torchrun itself."""
    [found] = [process for process in processes_of(cluster, job_id, node=node) if process.runs("torch.distributed.run")]
    return found


def test_a_start_that_lives_on_where_slurm_gave_its_node_up_harms_no_other(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """slurmd alone dies: SLURM starts the job again on another node, beside the ranks and the batch script of before."""
    run_dir = tmp_path / "r"
    # without a watchdog, whose timer would end the rank that is stopped here
    job_id = submit(cluster, run_dir, "--no-preflight", nodes=1, overrides=[*OVERRIDES, "watchdog=null"])
    wait_for_steps(cluster, job_id, run_dir, STRUCK_AFTER)
    node = cluster.field(job_id, "NodeList")
    # else it might be done before the other has begun
    older = rank_of(cluster, job_id, 0)
    older.kill(signal.SIGSTOP)
    try:
        cluster.daemons[node].kill()
        cluster.daemons[node].wait(timeout=20)
        wait_for_restarts(cluster, job_id, run_dir, 1, timeout_s=END_S)
        cluster.start_now(job_id)
        wait_for_steps(cluster, job_id, run_dir, 1, attempt=1)
        assert cluster.field(job_id, "NodeList") != node
    finally:
        older.kill(signal.SIGCONT)
    wait_for_end(cluster, job_id, run_dir, timeout_s=2 * START_S)
    end = time.monotonic() + END_S
    while left := processes_of(cluster, job_id):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    cluster.start_node(node)
    wait_for_node(cluster, node, lambda state: state == "idle", timeout_s=60)
    assert cluster.field(job_id, "Restarts") == "1", "the older start's batch script did not queue it again"
    assert restart_reasons(run_dir) == ["requeued by SLURM"]
    said = (run_dir / "logs/rank-0.log").read_text()
    assert "start 1 goes on with this run; start 0, this one, must end" in said
    assert f"job {job_id}: queued again by SLURM itself; this start has ended" in logs(run_dir)
    first, second = records_by_attempt(run_dir)
    assert first[-1]["step"] < 3 * INTERVAL
    assert [record["step"] for record in second] == list(range(INTERVAL + 1, STEPS + 1))
    both = {record["step"]: figures(record) for record in second}
    assert [figures(record) for record in first[INTERVAL:]] == [both[record["step"]] for record in first[INTERVAL:]]


def test_three_restarts_that_bring_nothing_end_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    job_id = submit(cluster, run_dir, "--no-preflight", "--max-restarts", "9", nodes=1, overrides=OVERRIDES)
    for restarts in range(4):
        wait_for_rank(cluster, job_id, 0, timeout_s=START_S).kill()
        if restarts < 3:
            wait_for_requeue(cluster, job_id, run_dir, restarts + 1)
            cluster.start_now(job_id)
    assert cluster.wait_for(job_id, "FAILED", "PENDING", "COMPLETED", timeout_s=END_S) == "FAILED", logs(run_dir)
    assert (cluster.field(job_id, "ExitCode"), cluster.field(job_id, "Restarts")) == ("93:0", "3")
    assert restart_reasons(run_dir) == ["crash"] * 3
    ended = job_record(run_dir)["ended"]
    assert ended["code"] == 93
    assert "not started again, 3 restarts have not brought it to its first checkpoint" in ended["why"]
    assert ended["why"] in logs(run_dir), "said in the batch script's log too"
