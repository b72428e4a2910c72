"""Submitting, against a Kubernetes API that speaks HTTP: what is sent, in which order, and what refusals become."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.entry import run_command
from launch.k8s import main

Command = Callable[..., tuple[int, str, str]]
JOBS = "/apis/batch.volcano.sh/v1alpha1/namespaces/ml/jobs"


class Api:
    """Answers by (method, path); keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Any]] = []
        self.gpus: list[int] = [8, 8]
        self.refuse: dict[tuple[str, str], int] = {}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                api.sent.append((self.command, self.path, body))
                status = api.refuse.get((self.command, self.path), 201 if body else 200)
                answer = api.answer(self.path, body) if status < 300 else {"details": {"name": "demo"}}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, path: str, body: Any) -> Any:
        if path == "/api/v1/nodes":
            items = [{"status": {"allocatable": {"cpu": "96", "nvidia.com/gpu": str(count)}}} for count in self.gpus]
            return {"kind": "NodeList", "apiVersion": "v1", "items": items}
        if path == f"{JOBS}/demo":
            return {"metadata": {"name": "demo", "uid": "1234"}}
        return body

    @property
    def posted(self) -> list[tuple[str, Any]]:
        return [(path, body) for method, path, body in self.sent if method == "POST"]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """The cluster of the current context, whose namespace is `ml`."""
    found = Api()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here", "users": [{"name": "me", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{found.server.server_port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "me", "namespace": "ml"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    # read when kubernetes.config is imported
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> tuple[int, str, str]:
        words = ["demo", "--image", "loupe:1", "--run-dir", "memory://runs/submitted", *arguments]
        code = run_command(main, words, prog_name="launch/k8s.py")
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_job_is_sent_as_it_is_rendered_and_then_what_belongs_to_it(api: Api, command: Command) -> None:
    arguments = ("--nodes", "2", "--gpus-per-node", "8", "--metrics", "podmonitor")
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "job demo in namespace ml: 2 pod(s) x 8" in out
    (job_path, job), (policy_path, policy), (monitor_path, monitor) = api.posted
    assert job_path == JOBS
    assert policy_path == "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"
    assert monitor_path == "/apis/monitoring.coreos.com/v1/namespaces/ml/podmonitors"
    owner = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": "demo", "uid": "1234"}
    assert [thing["metadata"].pop("ownerReferences") for thing in (policy, monitor)] == [[owner], [owner]]
    assert list(yaml.safe_load_all(command(*arguments, "--render", "volcano")[1])) == [job, policy, monitor]


def test_more_gpus_than_a_node_has(api: Api, command: Command) -> None:
    api.gpus = [4, 0, 2]
    code, _, err = command("--gpus-per-node", "8")
    assert code == 2
    assert "no node has so many, the largest has 4" in err
    assert not api.posted
    api.gpus = [0]
    code, _, err = command("--gpus-per-node", "8")
    assert code == 0
    assert "warning: no node has nvidia.com/gpu now" in err


def test_who_may_not_look_at_nodes_may_submit(api: Api, command: Command) -> None:
    api.refuse[("GET", "/api/v1/nodes")] = 403
    assert command("--gpus-per-node", "8")[0] == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (409, "--name demo: a job of that name is there"),
        (404, "cluster: has no Volcano, or no namespace ml"),
        (403, "you may not create Volcano jobs in namespace ml"),
        (500, "cluster: does not take the job (500"),
    ],
)
def test_refusals_are_one_line(api: Api, command: Command, status: int, message: str) -> None:
    api.refuse[("POST", JOBS)] = status
    code, _, err = command("--gpus-per-node", "8")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert len(api.posted) == 1, "nothing else is made"


def test_a_job_without_its_monitor_is_told(api: Api, command: Command) -> None:
    api.refuse[("POST", "/apis/monitoring.coreos.com/v1/namespaces/ml/podmonitors")] = 404
    code, _, err = command("--gpus-per-node", "8", "--metrics", "podmonitor")
    assert code == 0
    assert "its PodMonitor is not there (404" in err


def test_a_cluster_that_does_not_answer(api: Api, command: Command) -> None:
    api.server.shutdown()
    api.server.server_close()
    code, _, err = command("--gpus-per-node", "8")
    assert code == 2
    assert "cluster: does not answer" in err


def test_no_kubeconfig(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    code, _, err = command()
    assert code == 2
    assert "kubeconfig: " in err
    assert "--render jobset" in err


def test_submitting_imports_no_torch() -> None:
    code = "import sys, launch.k8s, launch.pods.task; sys.exit('torch' in sys.modules or 'torchx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
