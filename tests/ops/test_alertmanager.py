"""Alertmanager's example on a real Alertmanager: who is told, and what is held back."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus_server import Alertmanager, Servers, servers

pytestmark = pytest.mark.ops
__all__ = ["servers"]
EXAMPLE = Path(__file__).parents[2] / "ops/alertmanager/alertmanager.yml"


def example() -> dict[str, Any]:
    """Its routes and inhibitions, at once, with every receiver a webhook of this test."""
    tree: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    for route in (tree["route"], *tree["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in tree["receivers"]:
        name = receiver["name"]
        receiver.clear()
        receiver |= {"name": name, "webhook_configs": [{"url": "http://WEBHOOK", "send_resolved": False}]}
    return tree


def post(alertmanager: Alertmanager, *alerts: dict[str, str]) -> None:
    body = json.dumps([{"labels": labels} for labels in alerts]).encode()
    request = urllib.request.Request(
        f"{alertmanager.url}/api/v2/alerts", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120):
        pass


def of(name: str, severity: str, **labels: str) -> dict[str, str]:
    return {"alertname": name, "severity": severity, **labels}


def test_a_critical_alert_holds_back_what_follows_from_it(servers: Servers) -> None:
    alertmanager = servers.alertmanager(example())
    post(
        alertmanager,
        of("Watchdog", "none"),
        of("LoupeRunDown", "critical", run="down"), of("LoupeNoNewerCheckpoint", "critical", run="down"),
        of("LoupeNoProgress", "critical", run="stuck"), of("LoupeCheckpointOld", "critical", run="stuck"),
        of("LoupeDataWait", "warning", run="stuck"), of("LoupeMfuDrop", "warning", run="well"),
        of("LoupeGpuEcc", "critical", Hostname="n1", gpu="0"), of("LoupeGpuXid", "warning", Hostname="n1", gpu="0"),
        of("LoupeGpuXid", "warning", Hostname="n2", gpu="0"),
    )  # fmt: skip

    def told() -> set[tuple[str, str]]:
        return {
            (alert["labels"]["alertname"], alert["labels"].get("run") or alert["labels"].get("Hostname", ""))
            for body in list(alertmanager.received)
            for alert in body["alerts"]
        }

    expected = {
        ("Watchdog", ""), ("LoupeRunDown", "down"), ("LoupeNoProgress", "stuck"), ("LoupeMfuDrop", "well"),
        ("LoupeGpuEcc", "n1"), ("LoupeGpuXid", "n2"),
    }  # fmt: skip
    alertmanager.until(lambda: told() >= expected, "all that is to be told")
    held_back = {
        (alert["labels"]["alertname"], alert["labels"].get("run") or alert["labels"]["Hostname"])
        for alert in alertmanager.alerts()
        if alert["status"]["inhibitedBy"]
    }
    assert held_back == {
        ("LoupeNoNewerCheckpoint", "down"), ("LoupeCheckpointOld", "stuck"), ("LoupeDataWait", "stuck"), ("LoupeGpuXid", "n1")
    }  # fmt: skip
    assert told() == expected
    receivers = {body["receiver"]: {a["labels"]["alertname"] for a in body["alerts"]} for body in alertmanager.received}
    assert receivers["heartbeat"] == {"Watchdog"}
    assert set(receivers) == {"heartbeat", "page", "chat"}
