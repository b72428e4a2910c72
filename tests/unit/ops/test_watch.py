"""`make watch` and ops/compose.yaml: the same prometheus.yml, here run natively; of compose, what is seen without an engine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.watch import OPS, Ports, lay_out
from tests.prometheus_server import Prometheus
from trainer import metric_names
from trainer.discovery import TARGETS, Target, Targets, publish
from trainer.exporter import Exporter

ROOT = OPS.parent
COMPOSE: dict[str, Any] = yaml.safe_load((OPS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text())


def default(text: str) -> str:
    """What compose makes of ${NAME:-default} where the variable is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(source, target, mode) of each, as by default."""
    return [(*default(text).split(":"), "")[:3] for text in service["volumes"]]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------- compose


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_locked_down(name: str) -> None:
    service = SERVICES[name]
    user, _, _ = service["user"].partition(":")
    assert int(user) > 0
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    image = default(service["image"])
    assert re.search(r":v?\d+\.\d+\.\d+$", image) or image == "localhost/loupe", f"{image} is not pinned"
    for source, target, mode in mounts(service):
        if source in COMPOSE["volumes"]:
            continue
        assert mode == "ro", f"{source} could be written to"
        assert target.startswith("/")
        assert (OPS / source).exists() or source == "../runs", f"{source} is not there"


def test_all_listen_on_this_machine_only() -> None:
    """On the host's network nothing else keeps others out."""
    for name, service in SERVICES.items():
        assert service["network_mode"] == "host"
        said = " ".join([*map(str, service.get("command", ())), *map(str, service.get("environment", {}).values())])
        if name != "discovery":  # whose default it is
            assert "127.0.0.1" in said, name
        assert "0.0.0.0" not in said


def test_mounts_are_where_the_configs_look() -> None:
    inside = {target for _, target, _ in mounts(SERVICES["prometheus"])}
    assert "/etc/prometheus/prometheus.yml" in inside
    named = [*PROMETHEUS["rule_files"]]
    for job in PROMETHEUS["scrape_configs"]:
        named += [path for one in job.get("file_sd_configs", ()) for path in one["files"]]
    assert {f"/etc/prometheus/{Path(path).parent}" for path in named} <= inside
    inside = {target for _, target, _ in mounts(SERVICES["grafana"])}
    providers = yaml.safe_load((OPS / "grafana/provisioning/dashboards/loupe.yaml").read_text())["providers"]
    assert {provider["options"]["path"] for provider in providers} <= inside
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (OPS / "dashboards" / Path(home).name).exists()


def test_nothing_is_sent_out() -> None:
    environment = SERVICES["grafana"]["environment"]
    for name in ("GF_ANALYTICS_REPORTING_ENABLED", "GF_ANALYTICS_CHECK_FOR_UPDATES", "GF_NEWS_NEWS_FEED_ENABLED"):
        assert environment[name] == "false"
    assert not {"remote_write", "remote_read"} & PROMETHEUS.keys()


def test_provisioned_sources_are_the_servers() -> None:
    sources = yaml.safe_load((OPS / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    by_type = {source["type"]: source for source in sources}
    assert by_type["prometheus"]["isDefault"]
    assert by_type["prometheus"]["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    for kind, service in (("prometheus", "prometheus"), ("alertmanager", "alertmanager")):
        port = by_type[kind]["url"].rpartition(":")[2]
        assert f"--web.listen-address=127.0.0.1:{port}" in SERVICES[service]["command"]
    (alerting,) = PROMETHEUS["alerting"]["alertmanagers"]
    assert alerting["static_configs"][0]["targets"] == [by_type["alertmanager"]["url"].removeprefix("http://")]
    (loupe,) = (job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "loupe")
    (http,) = loupe["http_sd_configs"]
    command = SERVICES["discovery"]["command"]
    assert http["url"] == f"http://127.0.0.1:{command[command.index('--port') + 1]}/targets"


# --------------------------------------------------------------------------------------------------------------- watch


def test_layout_and_ports(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    for _ in range(2):  # again into the same folder
        lay_out(tmp_path / "watch", Ports(1, alertmanager=2222, discovery=3333), str(tmp_path / "found"))
    text = (tmp_path / "watch" / "prometheus.yml").read_text()
    assert "127.0.0.1:2222" in text
    assert "http://127.0.0.1:3333/targets" in text
    assert "9093" not in text
    usual = (OPS / "prometheus" / "prometheus.yml").read_text()
    assert Ports().in_config(usual) == usual
    assert (tmp_path / "watch" / "discovery").resolve() == tmp_path / "found"
    rules = OPS / "prometheus" / "rules"
    assert sorted(os.listdir(tmp_path / "watch" / "rules")) == sorted(os.listdir(rules))


def watch(*arguments: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "ops.watch", "--folder", str(folder / "watch"), *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "GOMAXPROCS": "1"},
    )  # fmt: skip


@pytest.mark.ops
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = watch("--port", str(taken.getsockname()[1]), folder=tmp_path)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: --port: 127.0.0.1:" in output
    assert "take another" in output


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.fixture
def rank() -> Iterator[int]:
    """Port of a rank that answers."""
    exporter = Exporter(metric_names.OF_RANK_0)
    exporter.of(metric_names.STEP).set(7)
    yield exporter.serve("127.0.0.1", 0)
    exporter.close()


@pytest.mark.ops
@pytest.mark.slow_ops
def test_finds_a_run_by_its_folder_and_by_its_file_and_ends_upon_a_signal(tmp_path: Path, rank: int) -> None:
    def targets(run: str) -> Targets:
        where = (Target(f"127.0.0.1:{rank}", "n1", "0"),)
        return Targets(
            run=run, job_id="7", folder=str(tmp_path / "runs" / run), targets=where, start=0, time=time.time()
        )

    folder = tmp_path / "runs" / "by-folder"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()  # what makes it a run folder
    (folder / TARGETS).write_text(json.dumps(targets("by-folder").as_record()))
    publish(str(tmp_path / "found"), targets("by-file"))
    port, alertmanager, discovery = free_ports(3)
    process = watch(
        "--runs", str(tmp_path / "runs"), "--discovery-dir", str(tmp_path / "found"), "--port", port,
        "--alertmanager-port", alertmanager, "--discovery-port", discovery, folder=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ctrl-C ends it" in line:
                break
        else:
            raise AssertionError(f"ended with {process.wait()}")
        server = Prometheus("watch", process, tmp_path, f"http://127.0.0.1:{port}")  # type: ignore[arg-type]
        end = time.monotonic() + 240
        while {one.labels["run"] for one in server.query("up == 1")} != {"by-folder", "by-file"}:
            assert time.monotonic() < end, server.query("up")
            time.sleep(0.5)
        assert {one.value for one in server.query("loupe_step")} == {7}
        with urllib.request.urlopen(f"http://127.0.0.1:{alertmanager}/-/ready", timeout=10):
            pass
        managers = server.get("/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
        assert [one["url"] for one in managers] == [f"http://127.0.0.1:{alertmanager}/api/v2/alerts"]
        assert all(rule["health"] != "err" for rule in server.rules())
        for line in process.stdout:
            if re.search(r"run by-f\w+: 1 of 1 processes answer", line):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    for one in (port, alertmanager, discovery):
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", int(one))) != 0, "a server lives on"


@pytest.mark.ops
def test_promtool_takes_the_config() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(OPS / "prometheus" / "prometheus.yml")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
