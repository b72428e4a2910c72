"""`make watch`: Prometheus and Alertmanager on this machine, watching the runs in a folder, with the rules of ops/prometheus.

The same prometheus.yml as ops/compose.yaml has, without containers. Grafana is not among it: the dashboards need that.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from trainer.discovery import DIR_VARIABLE
from trainer.errors import UserError

OPS = Path(__file__).parent
READY_S = 60.0
"""Longest wait for a server to answer."""
STOP_S = 20.0
ALERTMANAGER = """\
# alerts are shown on Alertmanager's page, and sent nowhere; see ops/alertmanager for what sends them
route: {receiver: none, group_by: [alertname, run]}
receivers: [{name: none}]
"""
_PROGRAMS = ("prometheus", "prometheus-alertmanager")


@dataclass(frozen=True)
class Ports:
    prometheus: int = 9090
    alertmanager: int = 9093
    discovery: int = 9901

    def in_config(self, text: str) -> str:
        """prometheus.yml with these."""
        for usual, port in ((9093, self.alertmanager), (9901, self.discovery)):
            text = text.replace(f"127.0.0.1:{usual}", f"127.0.0.1:{port}")
        return text


@dataclass
class Server:
    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    ready_at: str
    """URL that answers once it is ready."""

    def wait(self) -> None:
        """
        Raises:
            UserError: it ended, or does not answer in time; with the end of its log.
        """
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            self.check()
            with suppress(OSError), urllib.request.urlopen(self.ready_at, timeout=5):
                return
            time.sleep(0.2)
        raise UserError(f"{self.name} does not answer within {READY_S:.0f} s; {self._last_words()}")

    def check(self) -> None:
        if self.process.poll() is not None:
            raise UserError(f"{self.name} has ended with {self.process.returncode}; {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace")[-4000:].splitlines()
        return f"{self.log} ends with: {' / '.join(lines[-3:]) or 'nothing'}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=STOP_S)


def lay_out(folder: Path, ports: Ports, discovery_dir: str | None) -> None:
    """Make `folder` what prometheus.yml is beside: rules and folders with targets."""
    source = OPS / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(ports.in_config((source / "prometheus.yml").read_text()))
    (folder / "alertmanager.yml").write_text(ALERTMANAGER)
    shutil.rmtree(folder / "rules", ignore_errors=True)
    if (source / "rules").is_dir():
        shutil.copytree(source / "rules", folder / "rules")
    targets = {"discovery": Path(discovery_dir or source / "discovery"), "dcgm": source / "dcgm"}
    for name, path in targets.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path.resolve(), target_is_directory=True)


def start(folder: Path, name: str, command: list[str], ready_at: str) -> Server:
    log = folder / f"{name}.log"
    with open(log, "wb") as out:
        # a group of its own: Ctrl-C is this process's alone, which then stops them in order
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)
    return Server(name, process, log, ready_at)


def start_all(stack: ExitStack, folder: Path, runs: str, ports: Ports) -> list[Server]:
    """Each is stopped with `stack`. Ready when it returns.

    Raises:
        UserError: one cannot be started.
    """
    prometheus, alertmanager = (f"127.0.0.1:{port}" for port in (ports.prometheus, ports.alertmanager))
    serve = [sys.executable, "-m", "launch.cli", "discovery", "serve", "--root", runs, "--every", "5"]
    commands = {
        "discovery": ([*serve, "--port", str(ports.discovery)], f"http://127.0.0.1:{ports.discovery}/-/healthy"),
        "alertmanager": (
            ["prometheus-alertmanager", "--config.file=alertmanager.yml", "--storage.path=alertmanager",
             f"--web.listen-address={alertmanager}", "--cluster.listen-address=", "--log.level=warn"],
            f"http://{alertmanager}/-/ready",
        ),
        "prometheus": (
            ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=prometheus",
             "--storage.tsdb.retention.time=15d", f"--web.listen-address={prometheus}", "--log.level=warn"],
            f"http://{prometheus}/-/ready",
        ),
    }  # fmt: skip
    servers = []
    for name, (command, ready_at) in commands.items():
        server = start(folder, name, command, ready_at)
        stack.callback(server.stop)
        servers.append(server)
    for server in servers:
        server.wait()
    return servers


def check_machine(ports: Ports) -> None:
    """
    Raises:
        UserError: a program is missing, or a port taken.
    """
    missing = [program for program in _PROGRAMS if not shutil.which(program)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: apt install {' '.join(missing)}, or use ops/compose.yaml"
        )
    options = {
        "--port": ports.prometheus,
        "--alertmanager-port": ports.alertmanager,
        "--discovery-port": ports.discovery,
    }
    for option, port in options.items():
        with socket.socket() as s:
            # as servers do: a port that was closed a moment ago is free
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError as e:
                raise UserError(f"{option}: 127.0.0.1:{port} cannot be had ({e.strerror}); take another") from None


class Seen:
    """What Prometheus knows, a line for each change."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._runs: dict[str, str] = {}
        self._alerts: set[str] = set()

    def news(self) -> list[str]:
        """
        Raises:
            OSError: it does not answer.
        """
        ranks = {name: int(value) for name, value in self._ask(f"count by (run) ({_UP})", "run")}
        up = {name: int(value) for name, value in self._ask(f"sum by (run) ({_UP})", "run")}
        runs = {run: f"{up.get(run, 0)} of {number} processes answer" for run, number in ranks.items()}
        firing = 'ALERTS{alertstate="firing", alertname!="Watchdog"}'
        alerts = {name for name, _ in self._ask(f"count by (alertname, run) ({firing})", "alertname", "run")}
        lines = [f"run {run}: {words}" for run, words in runs.items() if self._runs.get(run) != words]
        lines += [f"run {run}: no longer there" for run in self._runs.keys() - runs.keys()]
        lines += [f"ALERT {alert}" for alert in sorted(alerts - self._alerts)]
        lines += [f"over: {alert}" for alert in sorted(self._alerts - alerts)]
        self._runs, self._alerts = runs, alerts
        return lines

    def _ask(self, expression: str, *labels: str) -> list[tuple[str, float]]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return [
            (" ".join(one["metric"].get(label, "") for label in labels).strip(), float(one["value"][1]))
            for one in found["data"]["result"]
        ]


def follow(servers: list[Server], url: str, ended: threading.Event, every_s: float = 5.0) -> None:
    """Say what changes, until `ended`.

    Raises:
        UserError: a server has ended.
    """
    seen = Seen(url)
    while not ended.wait(every_s):
        for server in servers:
            server.check()
        with suppress(OSError):  # busy; the next look tells
            for line in seen.news():
                click.echo(f"{time.strftime('%H:%M:%S')}  {line}")


@click.command(context_settings={"show_default": True})
@click.option("--runs", default="runs", metavar="PATH|URL", help="Folder with runs: those that live are watched.")
@click.option("--discovery-dir", envvar=DIR_VARIABLE, metavar="DIR", show_default=False,
              help=f"A discovery folder besides.  [default: ${DIR_VARIABLE}]")  # fmt: skip
@click.option("--folder", default="build/watch", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the servers keep their data and logs.")  # fmt: skip
@click.option("--port", default=9090, type=click.IntRange(1, 65535), help="Prometheus'.")
@click.option("--alertmanager-port", default=9093, type=click.IntRange(1, 65535))
@click.option("--discovery-port", default=9901, type=click.IntRange(1, 65535))
def main(
    runs: str, discovery_dir: str | None, folder: Path, port: int, alertmanager_port: int, discovery_port: int
) -> None:
    """Watch the runs in a folder with Prometheus and Alertmanager, on this machine, until Ctrl-C. Runs may begin, end and start
    again meanwhile.

    \b
    Examples:
      python -m ops.watch
      python -m ops.watch --runs s3://bucket/runs --port 9095
    """
    ports = Ports(port, alertmanager_port, discovery_port)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    try:
        check_machine(ports)
        if "://" not in runs:
            runs = os.path.abspath(runs)
            os.makedirs(runs, exist_ok=True)
        lay_out(folder.resolve(), ports, discovery_dir)
        with ExitStack() as stack:
            servers = start_all(stack, folder.resolve(), runs, ports)
            url = f"http://127.0.0.1:{port}"
            for words, path in (("targets", "/targets"), ("alerts", "/alerts"), ("a curve", f"/graph?{_CURVE}")):
                click.echo(f"{words:<14}{url}{path}")
            click.echo(f"{'alertmanager':<14}http://127.0.0.1:{alertmanager_port}")
            click.echo(f"watching the runs in {runs}; Ctrl-C ends it. Dashboards need Grafana: ops/compose.yaml")
            follow(servers, url, ended)
    except UserError as e:
        raise click.ClickException(str(e)) from None


_UP = 'up{job="loupe"}'
_CURVE = urllib.parse.urlencode({"g0.expr": 'loupe_loss{term="loss"}', "g0.tab": 0, "g0.range_input": "30m"})


if __name__ == "__main__":
    main()
