"""Every query of every dashboard asked of a real Prometheus, which scraped real exporters with figures that are known here.

What tests/ops shows of a whole training run, this shows of every metric in half a minute: that labels match, that nothing is
matched twice while a run's two starts are seen at once, and what some figures come to.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ops.dashboards.__main__ import FOLDER, NAMES
from ops.dashboards.asked import USUAL, asked, filled
from tests.prometheus_server import Prometheus, Series, Servers, servers
from trainer import metric_names as names
from trainer.exporter import Exporter
from trainer.metric_names import Metric

__all__ = ["servers"]
LABELS = {
    "state": names.GOODPUT_STATES, "stage": (*names.STAGES, "total"), "stat": ("min", "mean", "max"), "bin": tuple("01234567"),
    "level": tuple("01234567"),
    "term": ("loss", "denoising", "lpl", "gate", "lpl_mid"), "part": ("model", "import"), "source": ("table",),
    "phase": ("full_resolution",), "reason": ("crash",), "operation": ("save",), "metric": ("psnr_db",), "sink": ("wandb",),
    "error": ("server",), "pass": ("images",), "result": ("read", "kept"), "what": ("captions",),
}  # fmt: skip
STEPS = 400
GPUS = {"DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0x48, "DCGM_FI_DEV_XID_ERRORS": 79, "DCGM_FI_DEV_GPU_UTIL": 90}


def fill(exporter: Exporter, metrics: tuple[Metric, ...], growth: float) -> None:
    """Some value for every series; counters grow by it."""
    for metric in metrics:
        choices = [_choices(metric, label) for label in metric.labels]
        combinations = [()] if not choices else [(*rest,) for rest in _product(choices)]
        for labels in combinations:
            series = exporter.of(metric, *labels)
            if metric.kind == "counter":
                series.inc(growth)
            elif metric.kind == "histogram":
                series.observe(0.1)
            elif metric.kind == "gauge":
                series.set(time.time() - 30 if "timestamp" in metric.name else growth)


def _choices(metric: Metric, label: str) -> tuple[str, ...]:
    if metric in names.OF_STAGES:
        of_stages = {"stage": ("faces",), "state": names.STAGE_ITEM_STATES}
        return of_stages.get(label) or LABELS[label]
    return LABELS[label]


def _product(choices: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for choice in choices:
        found = [(*begun, one) for begun in found for one in choice]
    return found


def dcgm_exposition() -> str:
    """Two GPUs, as an exporter with our list of fields tells of them."""
    fields = [
        [part.strip() for part in line.split(",", 2)]
        for line in (FOLDER.parent / "grafana" / "dcgm-counters.csv").read_text().splitlines()
        if line.startswith("DCGM_")
    ]
    lines = []
    for name, kind, text in fields:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f'{name}{{gpu="{gpu}",Hostname="n1",UUID="u{gpu}"}} {GPUS.get(name, 1)}' for gpu in (0, 1)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def watched(servers: Servers, tmp_path: Path) -> Iterator[Prometheus]:
    """A run of two ranks in its second start, whose first one is still seen; a stage; two GPUs."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Dcgm(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(dcgm_exposition().encode())

        def log_message(self, *arguments: object) -> None:
            pass

    groups = []
    with ExitStack() as stack:
        exporters = []
        for start, rank in (("0", "0"), ("1", "0"), ("1", "1")):
            metrics = names.OF_RANK_0 if rank == "0" else names.OF_EVERY_RANK
            exporter = Exporter(metrics)
            exporters.append((exporter, tuple(metrics)))
            facts = {"recipe": "demo", "cluster": "slurm", "start": start, "host": "n1", "folder": "runs/demo"}
            exporter.of(names.JOB).info(facts)
            exporter.of(names.BUILD).info({"version": "0.1.0", "torch": "2.13"})
            labels = {"run": "demo", "job_id": f"4{start}", "node": "n1", "rank": rank}
            groups.append({"targets": [f"127.0.0.1:{exporter.serve('127.0.0.1', 0)}"], "labels": labels})
            stack.callback(exporter.close)
        stage = Exporter(names.OF_STAGES)
        exporters.append((stage, names.OF_STAGES))
        groups.append(
            {
                "targets": [f"127.0.0.1:{stage.serve('127.0.0.1', 0)}"],
                "labels": {"run": "faces", "job_id": "9", "node": "n1"},
            }
        )
        stack.callback(stage.close)
        gpus = ThreadingHTTPServer(("127.0.0.1", 0), Dcgm)
        Thread(target=gpus.serve_forever, daemon=True).start()
        stack.callback(gpus.shutdown)
        (tmp_path / "targets.json").write_text(json.dumps(groups))
        rules = tmp_path / "rules.yaml"
        rules.write_text(
            'groups: [{name: t, rules: [{alert: T, expr: "max by (run, node, rank) (up)", labels: {severity: warning}}]}]'
        )
        loupe = {"job_name": "loupe", "file_sd_configs": [{"files": [str(tmp_path / "targets.json")]}]}
        dcgm = {"job_name": "dcgm", "static_configs": [{"targets": [f"127.0.0.1:{gpus.server_port}"]}]}
        for exporter, metrics in exporters:
            fill(exporter, metrics, 10)
        first, second = exporters[0][0], exporters[1][0]
        first.of(names.LOSS, "denoising").set(4)
        for exporter in (first, second):
            exporter.of(names.GOODPUT, "productive").inc(10)
        first.of(names.STEP).set(5)
        server = servers.prometheus({"scrape_configs": [loupe, dcgm]}, rules=[rules])
        for _ in range(40):
            for exporter, metrics in exporters[1:]:
                fill(exporter, metrics, 10)
            for metric, value in ((names.STEP, STEPS), (names.PLANNED_STEPS, 1000)):
                second.of(metric).set(value)
            second.of(names.GOODPUT, "productive").inc(10)
            second.of(names.LOSS, "denoising").set(4)
            time.sleep(0.25)
        server.until(lambda: server.query("ALERTS"), "the alert")
        yield server


SHORTER = {"offset 1m": "offset 5s", ":30s]": ":1s]", ":15s]": ":1s]", ":1m]": ":1s]"}
"""What of the queries is longer than this test."""


def asked_of(watched: Prometheus, name: str) -> dict[str, list[list[Series]]]:
    """By panel, what each of its queries gives."""
    found: dict[str, list[list[Series]]] = {}
    for one in asked(FOLDER / f"{name}.json"):
        run = "demo" if name == "run" else ".*"
        expression = filled(one.expression, {**USUAL, "__rate_interval": "8s", "__range": "5m", "run": run})
        for long, short in SHORTER.items():
            expression = expression.replace(long, short)
        found.setdefault(one.panel, []).append(watched.query(expression))
    return found


@pytest.mark.ops
def test_every_query_gives_data_and_the_right_figures(watched: Prometheus) -> None:
    found = {name: asked_of(watched, name) for name in NAMES}
    for name, of_panels in found.items():
        for panel, results in of_panels.items():
            # a start's mark is there for as long as its offset, which is over by now
            assert panel.startswith("annotation") or all(results), f"{name}, {panel} is empty"
            assert not any(math.isnan(series.value) for result in results for series in result), f"{name}, {panel}"

    def figure(name: str, panel: str, of: int = 0, **labels: str) -> float:
        values = [one.value for one in found[name][panel][of] if labels.items() <= one.labels.items()]
        assert len(values) == 1, f"{name}, {panel}: {found[name][panel]}"
        return values[0]

    assert figure("run", "State") == 2
    assert figure("run", "Alerts") == 2
    assert figure("run", "Step") == STEPS
    assert figure("run", "Done") == pytest.approx(STEPS / 1000)
    # 10 steps every quarter of a second, of which 600 are left; sleeping takes a little longer on a busy machine
    assert 15 <= figure("run", "Time left") <= 45
    assert figure("run", "Last step") == pytest.approx(30, abs=25)
    # productive counts twice as fast as each of the other states
    assert figure("run", "Goodput") == pytest.approx(2 / (len(names.GOODPUT_STATES) + 1))
    assert figure("run", "Goodput, last hour") == pytest.approx(2 / (len(names.GOODPUT_STATES) + 1))
    assert figure("run", "Perceptual loss: shares", 1) == pytest.approx(0.6)
    assert figure("run", "A step by stage", stage="backward") == pytest.approx(0.1)
    assert figure("fleet", "Runs training") == 1
    assert figure("fleet", "Runs stalled") == 0
    assert figure("fleet", "Runs", 0, run="demo") == 2
    assert figure("data", "Stages", 0) == pytest.approx(1 / len(names.STAGE_ITEM_STATES))
    assert figure("gpu", "Throttled") == 2
    assert [one.value for one in found["gpu"]["Clocks lowered"][1]] == [2]
    assert figure("gpu", "GPUs with an XID") == 2
