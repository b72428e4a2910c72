"""What pods leave behind, and what the next start makes of it."""

import time
from pathlib import Path
from typing import Any

import pytest

from launch.job import live_job
from launch.pods.heartbeat import ALIVE, Heartbeat, is_alive
from launch.pods.records import PodJob, a_pod_has_failed, claim, judge, record_name, write_end, write_start
from launch.ranks import Decision
from trainer.errors import UserError
from trainer.run_folder import JOB, RunFolder


def pod_job(attempt: str, name: str = "demo", *, max_restarts: int = 5) -> PodJob:
    return PodJob(name, nodes=2, gpus_per_node=2, cpu=True, max_restarts=max_restarts, attempt=attempt)


class History:
    """Starts of one job of 2 pods x 2 ranks, as the pod of rank 0 sees them."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = RunFolder(str(tmp_path / "run"))
        self.work_dir = tmp_path
        self.number = 0

    def start(self, **more: Any) -> Decision | None:
        self.number += 1
        job = pod_job(f"uid.{self.number}", **more)
        return judge(self.folder, job, claim(self.folder, job, host="here"), self.work_dir)

    def end(
        self, index: int, codes: list[int | None], *, asked: float | None = None, crashed: float | None = None
    ) -> None:
        by_rank = {index * 2 + i: code for i, code in enumerate(codes) if code is not None}
        lines = {index * 2 + i: f"rank {index * 2 + i} says this" for i in range(2)}
        write_end(self.folder, pod_job(f"uid.{self.number}"), index, node=f"node-{index}", codes=by_rank, last_lines=lines,
                  asked_at=asked, crashed_at=crashed)  # fmt: skip

    @property
    def reasons(self) -> list[str]:
        return [entry["reason"] for entry in self.folder.read_json(JOB)["restarts"]]

    def saved(self, step: int) -> None:
        """As if the start had done this step and committed a checkpoint of it."""
        self.folder.write_text(f"metrics/{self.number:04d}.jsonl", f'{{"step": {step}}}\n')
        self.folder.write_text(f"checkpoints/step-{step:08d}-{self.number:08x}/COMMIT", "{}\n")


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def test_a_preemption_does_not_count(history: History) -> None:
    assert history.start(max_restarts=0) is None
    for _ in range(5):  # more than the restarts without a step that a run may have
        history.end(0, [75, 75], asked=100.5)
        history.end(1, [75, 75], asked=100.0)
        decision = history.start(max_restarts=0)
        assert decision is not None
        assert decision.restart
    assert history.reasons == ["preempted"] * 5


def test_a_crash_in_another_pod_is_a_crash_though_ours_was_told_to_stop(history: History) -> None:
    """Pod 1 crashes; the cluster deletes pod 0 for it, whose ranks save, or are told before they can listen."""
    history.start(max_restarts=1)
    history.end(1, [None, 1], crashed=100.0)
    history.end(0, [-15, 75], asked=101.0)
    assert a_pod_has_failed(history.folder, pod_job("uid.1"))
    decision = history.start(max_restarts=1)
    assert decision is not None
    assert decision.restart
    assert "rank 3 ended with code 1: rank 3 says this" in decision.why
    assert history.reasons == ["crash"]
    history.end(1, [None, 1], crashed=100.0)
    history.end(0, [75, 75], asked=101.0)
    decision = history.start(max_restarts=1)
    assert decision is not None
    assert not decision.restart
    assert "budget of 1 restarts is spent" in decision.why


def test_a_node_that_is_not_fit_is_named_and_counts(history: History) -> None:
    """Pod 1's node fails its check; the cluster deletes pod 0 for it, whose ranks wait at the rendezvous."""
    history.start(max_restarts=1)
    history.end(1, [71, None], crashed=100.0)
    history.end(0, [-15, -15], asked=101.0)
    decision = history.start(max_restarts=1)
    assert decision is not None
    assert decision.restart
    assert "rank 2 ended with code 71: rank 2 says this" in decision.why
    assert "`kubectl cordon node-1`" in decision.why
    assert history.reasons == ["bad node"]
    assert history.folder.read_json(JOB)["bad_nodes"] == {"node-1": "rank 2 says this"}
    history.end(0, [71, None], crashed=100.0)
    decision = history.start(max_restarts=1)
    assert decision is not None
    assert not decision.restart, "no other node was found: the budget ends it"
    assert "budget of 1 restarts is spent; `kubectl cordon node-0`" in decision.why
    assert set(history.folder.read_json(JOB)["bad_nodes"]) == {"node-0", "node-1"}


def test_ranks_of_other_pods_do_not_wait_for_one_that_has_stopped_for_good(history: History) -> None:
    history.start()
    assert not a_pod_has_failed(history.folder, pod_job("uid.1"))
    history.end(1, [75, 93], asked=100.0)
    assert a_pod_has_failed(history.folder, pod_job("uid.1"))


def test_lost_pods_do_not_cost_the_budget_but_must_get_on(history: History) -> None:
    history.start(max_restarts=0)
    for step in (3, 9, 12):
        history.saved(step)
        decision = history.start(max_restarts=0)
        assert decision is not None
        assert decision.restart
    assert history.reasons == ["lost"] * 3
    for _ in range(2):
        decision = history.start(max_restarts=0)
        assert decision is not None
        assert decision.restart
    decision = history.start(max_restarts=0)
    assert decision is not None
    assert (decision.restart, decision.code) == (False, 93)
    assert "not brought it past the checkpoint of step 12" in decision.why


def test_one_lost_pod_and_others_that_could_not_save_is_a_loss(history: History) -> None:
    history.start(max_restarts=0)
    history.end(0, [None, None], asked=100.0)  # killed by their launcher at the end of the grace
    decision = history.start(max_restarts=0)
    assert decision is not None
    assert decision.restart
    assert history.reasons == ["lost"]


def test_a_suspended_job_goes_on_with_the_same_attempt(history: History) -> None:
    history.start()
    history.end(0, [75, 75], asked=100.0)
    history.end(1, [75, 75], asked=100.0)
    write_start(history.folder, pod_job("uid.1"), 1, node="node-1")  # pod 1 is back first
    history.number = 0
    decision = history.start()
    assert decision is not None
    assert decision.restart
    assert history.reasons == ["preempted"]


def test_a_job_that_has_ended_begins_with_a_new_budget(history: History) -> None:
    history.start(max_restarts=0)
    history.end(0, [1, 1], crashed=100.0)
    history.end(1, [1, 1], crashed=100.0)
    decision = history.start(max_restarts=0)
    assert decision is not None
    assert not decision.restart
    assert history.start(max_restarts=0) is None, "the user has applied it again"
    assert history.folder.read_json(JOB)["ended"] is None


def test_a_live_jobs_folder_is_refused_by_name(history: History) -> None:
    history.start()
    with Heartbeat(history.folder, "demo", "uid.1"):
        assert live_job(history.folder) == "Kubernetes job demo"
        with pytest.raises(UserError, match="in use by Kubernetes job demo"):
            claim(history.folder, pod_job("x.1", name="other"), host="there")
        assert claim(history.folder, pod_job("uid.2"), host="there")["attempt"] == "uid.1", "its own goes on"
    assert live_job(history.folder) is None
    assert claim(history.folder, pod_job("x.1", name="other"), host="there")["attempt"] is None


def test_a_folder_of_another_cluster_that_did_not_end_is_refused(history: History) -> None:
    history.folder.write_json(JOB, {"cluster": "slurm", "job_id": "77", "host": "login", "restarts": [], "ended": None})
    with pytest.raises(UserError, match="in use by a slurm job"):
        claim(history.folder, pod_job("uid.1"), host="here")
    history.folder.write_json(JOB, {"cluster": "local", "pid": 7, "restarts": [], "ended": {"code": 75, "why": ""}})
    assert claim(history.folder, pod_job("uid.1"), host="here")["cluster"] == "kubernetes"


def test_a_heart_that_stopped(history: History) -> None:
    history.folder.write_json(ALIVE, {"job": "demo", "time": time.time() - 3600})
    assert not is_alive(history.folder)


def test_names_of_attempts_stay_in_the_folder() -> None:
    assert record_name("../../etc/x y", 3) == "pods/..-..-etc-x-y/0003.json"
    names = {record_name(f"{'n' * 200}.{version}", 0) for version in (1, 2)}
    assert len(names) == 2
    assert max(map(len, names)) < 120
