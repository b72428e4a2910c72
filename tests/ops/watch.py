"""Real servers that watch real runs by the rules of ops/prometheus, whose times are divided so that tests can wait for them."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ops.prometheus.render import all_rules, shortened
from tests.ops.live_run import LiveRun
from tests.prometheus_server import Alertmanager, Prometheus, Servers

WAIT_S = 240.0


@dataclass
class Watch:
    """Both servers, with the rules shortened by `factor`."""

    prometheus: Prometheus
    alertmanager: Alertmanager
    folder: Path

    def await_alerts(self, *names: str, within_s: float = WAIT_S, run: LiveRun | None = None) -> None:
        """Until the webhook has been sent all of them."""

        def missing() -> set[str]:
            found = self.alertmanager.notified()
            return set(names) - found

        end = time.monotonic() + within_s
        while left := missing():
            log = run.log() if run else ""
            assert time.monotonic() < end, f"{left}: not within {within_s} s; {self.prometheus.alerts()}\n{log}"
            time.sleep(0.5)


@contextlib.contextmanager
def watch(tmp_path: Path, factor: float) -> Iterator[Watch]:
    (tmp_path / "discovery").mkdir()
    (tmp_path / "dcgm").mkdir()
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(shortened(all_rules(), factor), width=1000))
    subprocess.run(["promtool", "check", "rules", str(rules)], check=True, capture_output=True, timeout=60)
    jobs = [
        {"job_name": name, "file_sd_configs": [{"files": [f"{tmp_path}/{folder}/*.json"], "refresh_interval": "1s"}]}
        for name, folder in (("loupe", "discovery"), ("dcgm", "dcgm"))
    ]
    with ExitStack() as stack:
        servers = Servers(tmp_path, stack)
        alertmanager = servers.alertmanager()
        prometheus = servers.prometheus({"scrape_configs": jobs}, rules=[rules], alertmanager=alertmanager)
        yield Watch(prometheus, alertmanager, tmp_path)


@pytest.fixture
def minutes_as_seconds(tmp_path: Path) -> Iterator[Watch]:
    with watch(tmp_path, 60) as found:
        yield found


@pytest.fixture
def minutes_as_six_seconds(tmp_path: Path) -> Iterator[Watch]:
    """Where several starts must come within an alert's window."""
    with watch(tmp_path, 10) as found:
        yield found


@pytest.fixture
def minutes_as_fifteen_seconds(tmp_path: Path) -> Iterator[Watch]:
    """Where five starts must: on a busy machine a start may take most of a minute."""
    with watch(tmp_path, 4) as found:
        yield found
