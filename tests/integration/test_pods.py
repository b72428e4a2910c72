"""The container commands of a rendered manifest, run as a kubelet runs them, as processes of this machine.

What cannot be had here is played: a pod's network by a port of its own, the cluster's DNS by an address, and the
controller that makes pods again by the test, which does what the manifest's own policies say.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.entry import run_command
from launch.k8s import main
from tests.distributed.harness import free_port
from tests.kubernetes import environment_of, expand
from tests.slurm_jobs import steps_by_attempt
from tests.tiny import TINY

SHORT = ("phases.low_resolution.steps=4", "phases.full_resolution.steps=4", "phases.perceptual.steps=4")
SETTINGS = [word for override in (*TINY, *SHORT) for word in ("--set", override)]


class Cluster:
    """One job, its pods as processes."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._volcano = job["kind"] == "Job"
        if self._volcano:
            self._pods = [task["template"]["spec"] for task in job["spec"]["tasks"]]
            self._policies = job["spec"]["policies"]
        else:
            self._rules = job["spec"]["failurePolicy"]["rules"]
            self._job = job["spec"]["replicatedJobs"][0]["template"]["spec"]
            self._pods = [self._job["template"]["spec"]] * self._job["completions"]
        self.ports = [free_port() for _ in self._pods]
        self._scratch: list[tempfile.TemporaryDirectory[str]] = []
        self.grace_s = int(self._pods[0]["terminationGracePeriodSeconds"])

    def start(self, version: int) -> list[subprocess.Popen[str]]:
        return [self._pod(index, version) for index in range(len(self._pods))]

    def _pod(self, index: int, version: int) -> subprocess.Popen[str]:
        (container,) = self._pods[index]["containers"]
        if self._volcano:
            given = {"LOUPE_GROUP": "demo-5f2e", "LOUPE_VERSION": str(version), "VC_TRAIN_0_HOSTS": "127.0.0.1"}
        else:
            given = {"LOUPE_ATTEMPT": f"5f2e-{version}", "JOB_COMPLETION_INDEX": str(index)}
        variables = environment_of(container, {**given, "LOUPE_NODE": f"node-{index}"})
        assert variables["LOUPE_NODE"] == f"node-{index}"
        if not self._volcano:
            assert variables["LOUPE_MAIN_HOST"] == "demo-train-0-0.demo"
            variables["LOUPE_MAIN_HOST"] = "127.0.0.1"
        # the emptyDir at /tmp: a new one for each pod, of a name short enough for sockets within it
        scratch = tempfile.TemporaryDirectory(prefix="pod-")
        self._scratch.append(scratch)
        variables |= {name: scratch.name for name in ("HOME", "TMPDIR") if variables[name] == "/tmp"}
        variables["LOUPE_CONFIG"] = variables["LOUPE_CONFIG"].replace("port: 9400", f"port: {self.ports[index]}")
        path = f"{Path(sys.executable).parent}:{os.defpath}"
        return subprocess.Popen(
            [expand(word, variables) for word in container["args"]],
            env={**variables, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def action(self, exit_code: int) -> str:
        """What the controller does with the job of a pod that ends with this code."""
        if self._volcano:  # the first policy that fits; a pod that fails is the event PodFailed too
            for policy in self._policies:
                if policy.get("event") == "PodFailed" or policy.get("exitCode") == exit_code:
                    return {"RestartJob": "again", "TerminateJob": "never"}[policy["action"]]
            raise AssertionError("no policy")
        reason = "BackoffLimitExceeded"
        for rule in self._job["podFailurePolicy"]["rules"]:
            if rule["action"] == "FailJob" and exit_code in rule["onExitCodes"]["values"]:
                reason = "PodFailurePolicy"
        failed = any(r["action"] == "FailJobSet" and reason in r["onJobFailureReasons"] for r in self._rules)
        return "never" if failed else "again"


def render(capsys: pytest.CaptureFixture[str], kind: str, *arguments: str) -> dict[str, Any]:
    words = ["demo", "--image", "loupe:test", *SETTINGS, *arguments, "--render", kind]
    assert run_command(main, words, prog_name="launch/k8s.py") == 0
    job, *_ = yaml.safe_load_all(capsys.readouterr().out)
    assert isinstance(job, dict)
    return job


def until_step(run_dir: Path, step: int, pods: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not any(done >= step for steps in steps_by_attempt(run_dir) for done in steps):
        for pod in pods:
            assert pod.poll() is None, pod.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get to the step"
        time.sleep(0.05)


def ends(pods: list[subprocess.Popen[str]], *, timeout_s: float) -> tuple[list[int], str]:
    try:
        outputs = [pod.communicate(timeout=timeout_s)[0] for pod in pods]
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
    return [pod.returncode for pod in pods], "\n".join(outputs)


@pytest.mark.cluster
def test_preempted_pods_save_and_their_successors_do_every_step_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, run_dir = tmp_path / "volume", tmp_path / "volume/runs/demo"
    volume.mkdir()
    job = render(
        capsys, "volcano", "--cpu", "--nodes", "2", "--run-dir", str(run_dir), "--volume-claim", f"data:{volume}"
    )
    cluster = Cluster(job)
    pods = cluster.start(0)
    until_step(run_dir, 2, pods)
    for port in cluster.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            told = answer.read()
        assert b"loupe_build_info{" in told
        assert (b"loupe_world_size 2.0" in told) == (port == cluster.ports[0]), "rank 0 tells what is of the job"
    asked = time.monotonic()
    pods[1].send_signal(signal.SIGTERM)  # the one that is preempted; then Volcano deletes the others
    time.sleep(0.2)
    pods[0].send_signal(signal.SIGTERM)
    codes, output = ends(pods, timeout_s=cluster.grace_s)
    assert codes == [75, 75], output
    assert time.monotonic() - asked < 60
    assert "[rank 0] " in output
    assert "[rank 1] " in output
    assert {cluster.action(code) for code in codes} == {"again"}
    (first,) = steps_by_attempt(run_dir)
    codes, output = ends(cluster.start(1), timeout_s=240)
    assert codes == [0, 0], output
    assert "the start before: stopped after saving (preempted)" in output
    first, second = steps_by_attempt(run_dir)
    assert [*first, *second] == list(range(1, 13)), "every step once"
    record = json.loads((run_dir / "job.json").read_text())
    assert [entry["reason"] for entry in record["restarts"]] == ["preempted"]
    assert record["ended"]["code"] == 0


def test_a_node_that_is_not_fit_is_named_and_the_budget_ends_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    job = render(
        capsys, "jobset", "--run-dir", f"{volume}/run", "--volume-claim", f"data:{volume}", "--max-restarts", "1"
    )
    cluster = Cluster(job)
    for start in range(2):
        (code,), output = ends(cluster.start(start), timeout_s=240)
        assert code == 71, output
        assert cluster.action(code) == "again"
        assert "loupe pod: check of node-0: failed: GPUs: 0 of 1" in output
    (record,) = (json.loads(path.read_text()) for path in (volume / "run/doctor").glob("5f2e-0-0000-node-0.json"))
    assert (record["node"], record["code"]) == ("node-0", 71)
    assert not (volume / "run/attempts").exists(), "nothing started there"
    (code,), output = ends(cluster.start(2), timeout_s=240)
    assert (code, cluster.action(code)) == (93, "never"), output
    assert "the budget of 1 restarts is spent; `kubectl cordon node-0`" in output
    job_record = json.loads((volume / "run/job.json").read_text())
    assert [entry["reason"] for entry in job_record["restarts"]] == ["bad node"]
    assert job_record["bad_nodes"]["node-0"].startswith("node-0 is not fit to start on: GPUs: ")


def test_a_pod_without_its_gpus_and_without_a_check_ends_the_job_for_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    job = render(capsys, "jobset", "--run-dir", f"{volume}/run", "--volume-claim", f"data:{volume}", "--no-preflight")
    cluster = Cluster(job)
    (code,), output = ends(cluster.start(0), timeout_s=240)
    assert code == 93, output
    assert (cluster.action(93), cluster.action(75), cluster.action(1)) == ("never", "again", "again")
    ended = json.loads((volume / "run/job.json").read_text())["ended"]
    assert ended["code"] == 93
    assert "--gpus-per-node: rank 0 is to have GPU 0" in ended["why"]
