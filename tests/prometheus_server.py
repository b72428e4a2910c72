"""Debian's Prometheus and Alertmanager for tests: each a process in a folder of its own, at a free port of this machine.

    from tests.prometheus_server import Prometheus, Servers, servers

    @pytest.mark.ops
    def test_it(servers: Servers) -> None:
        alertmanager = servers.alertmanager()
        prometheus = servers.prometheus(
            {"scrape_configs": [{"job_name": "loupe", "file_sd_configs": [{"files": [f"{folder}/*.json"]}]}]},
            rules=[RULES], alertmanager=alertmanager,
        )
        prometheus.until(lambda: prometheus.query("up == 1"), "a target")

Tests are marked `ops` or `slow_ops`: tests/conftest.py skips them where the programs are not installed. Every wait has a
deadline; a server that ends or never gets ready fails with its own log.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

START_S = 240.0
"""Longest wait for a server to get ready, on a machine that is busy."""
WAIT_S = 240.0


class Series(NamedTuple):
    labels: dict[str, str]
    """`__name__` besides, where the expression keeps it."""
    value: float


@dataclass
class Server:
    """What both have: a process, its address, and the log to show when it fails."""

    name: str
    process: "subprocess.Popen[bytes]"
    folder: Path
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The JSON tree of an answer; of an error, its text is raised."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            with urllib.request.urlopen(f"{self.url}{path}{query}", timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{self.name} {path} {parameters}: {e.read().decode(errors='replace')}") from None

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def until(self, condition: Callable[[], Any], what: str, within_s: float = WAIT_S) -> Any:
        """What `condition` gives as soon as it is true.

        Raises:
            AssertionError: it stayed false, or the server ended; with the end of the server's log.
        """
        end = time.monotonic() + within_s
        while not (found := condition()):
            assert self.process.poll() is None, f"{self.name} has ended:\n{self.log()[-4000:]}"
            assert time.monotonic() < end, f"{what}: not within {within_s} s; {self.name} says:\n{self.log()[-4000:]}"
            time.sleep(0.2)
        return found

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=20):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)


class Prometheus(Server):
    def query(self, expression: str, at: float | None = None) -> list[Series]:
        """Of an instant vector or a scalar, now or at a Unix time. A mistake in the expression is raised as an assertion."""
        when = {} if at is None else {"time": str(at)}
        data = self.get("/api/v1/query", query=expression, **when)["data"]
        if data["resultType"] == "scalar":
            return [Series({}, _number(data["result"][1]))]
        assert data["resultType"] == "vector", f"{expression} is a {data['resultType']}; use query_range"
        return [Series(found["metric"], _number(found["value"][1])) for found in data["result"]]

    def value(self, expression: str) -> float:
        """Of an expression with one series.

        Raises:
            AssertionError: there are none, or several.
        """
        found = self.query(expression)
        assert len(found) == 1, f"{expression}: {found}"
        return found[0].value

    def query_range(
        self, expression: str, seconds: float, step_s: float = 1.0
    ) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and values of each series over the last `seconds`."""
        now = time.time()
        data = self.get(
            "/api/v1/query_range", query=expression, start=str(now - seconds), end=str(now), step=str(step_s)
        )["data"]
        return [(found["metric"], [_number(v) for _, v in found["values"]]) for found in data["result"]]

    def targets(self) -> list[dict[str, Any]]:
        """Active ones, as /api/v1/targets has them: labels, health, lastError, lastScrapeDuration, scrapeUrl, ..."""
        found: list[dict[str, Any]] = self.get("/api/v1/targets", state="active")["data"]["activeTargets"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing ones: labels, annotations, state, value."""
        found: list[dict[str, Any]] = self.get("/api/v1/alerts")["data"]["alerts"]
        return found

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.alerts() if alert["state"] == "firing"}

    def rules(self) -> list[dict[str, Any]]:
        """All rules of all groups: name, query, health, lastError, type."""
        groups = self.get("/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def configure(self, config: dict[str, Any]) -> None:
        """Another prometheus.yml for the same process; its `rule_files` and `alerting` stay unless given. Series of a scrape
        job that is not in it any more stay for the look-back of 5 minutes; those of a target that discovery drops do not."""
        path = self.folder / "prometheus.yml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **config}))
        request = urllib.request.Request(f"{self.url}/-/reload", method="POST")
        with urllib.request.urlopen(request, timeout=120):
            pass


@dataclass
class Alertmanager(Server):
    received: list[dict[str, Any]] = field(default_factory=list)
    """What its webhook was sent, oldest first: the body of each notification, with `status`, `groupLabels`, `alerts`."""

    def notified(self, status: str = "firing") -> set[str]:
        """Names of alerts that a notification of this status has told of."""
        return {
            alert["labels"]["alertname"]
            for body in list(self.received)
            for alert in body["alerts"]
            if alert["status"] == status
        }

    def alerts(self) -> list[dict[str, Any]]:
        """What it holds now, inhibited ones included: labels, annotations, status."""
        found: list[dict[str, Any]] = self.get("/api/v2/alerts")
        return found


@dataclass
class Servers:
    """Starts them; what the `servers` fixture gives. All end with the test."""

    folder: Path
    stack: ExitStack
    _count: int = 0

    def prometheus(
        self,
        config: dict[str, Any],
        *,
        rules: Sequence[Path | str] = (),
        alertmanager: Alertmanager | None = None,
        interval_s: float = 1.0,
        arguments: Sequence[str] = (),
    ) -> Prometheus:
        """`config`: prometheus.yml; `global` (scraping and evaluating each `interval_s`), `rule_files` and `alerting` are
        added where it has none. Ready when it returns."""
        folder, port = self._new_folder("prometheus"), _free_port()
        every = f"{round(interval_s * 1000)}ms"
        whole = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(Path(path).resolve()) for path in rules],
        }
        if alertmanager:
            targets = [alertmanager.url.removeprefix("http://")]
            whole["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": targets}]}]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump({**whole, **config}))
        process = self._start(folder, [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--web.enable-lifecycle", "--log.level=warn", *arguments,
        ])  # fmt: skip
        server = Prometheus("prometheus", process, folder, f"http://127.0.0.1:{port}")
        server.until(server.is_ready, "ready to answer", START_S)
        return server

    def alertmanager(self, config: dict[str, Any] | None = None) -> Alertmanager:
        """`config`: alertmanager.yml, in which the text `http://WEBHOOK` stands for this test's receiver; without one, all
        alerts go there at once. Ready when it returns."""
        folder, port = self._new_folder("alertmanager"), _free_port()
        received: list[dict[str, Any]] = []
        webhook = self.stack.enter_context(_Webhook(received))
        text = yaml.safe_dump(config or _EVERYTHING_AT_ONCE).replace("http://WEBHOOK", webhook)
        (folder / "alertmanager.yml").write_text(text)
        process = self._start(folder, [
            "prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=warn",
        ])  # fmt: skip
        server = Alertmanager("alertmanager", process, folder, f"http://127.0.0.1:{port}", received)
        server.until(server.is_ready, "ready to answer", START_S)
        return server

    def _new_folder(self, name: str) -> Path:
        self._count += 1
        folder = self.folder / f"{name}-{self._count}"
        folder.mkdir()
        return folder

    def _start(self, folder: Path, command: list[str]) -> "subprocess.Popen[bytes]":
        program = shutil.which(command[0])
        assert program, f"{command[0]} is not installed; mark the test `ops` or `slow_ops`"
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                [program, *command[1:]], cwd=folder, stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"}
            )
        self.stack.callback(Server(command[0], process, folder, "").stop)
        return process


_EVERYTHING_AT_ONCE = {
    "route": {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"},
    "receivers": [{"name": "test", "webhook_configs": [{"url": "http://WEBHOOK", "send_resolved": True}]}],
}  # fmt: skip


class _Webhook:
    """A server that notes each body that is posted to it; its URL."""

    def __init__(self, received: list[dict[str, Any]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


def _number(text: str) -> float:
    return {"+Inf": math.inf, "-Inf": -math.inf, "NaN": math.nan}.get(text) or float(text)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    folder = tmp_path / "servers"
    folder.mkdir()
    with ExitStack() as stack:
        yield Servers(folder, stack)
