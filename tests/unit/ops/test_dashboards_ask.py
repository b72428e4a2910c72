"""Every query of every dashboard asked of a real Prometheus, which scraped real exporters with figures that are known here.

What tests/ops shows of a whole training run, this shows of every metric in a few seconds: that labels match, that nothing is
matched twice while a run's two starts are seen at once, and what some figures come to. All queries are asked of one moment,
by which every exporter has answered with its last figures: what they give does not hang on how fast the machine is.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
STEPS_PLANNED = 1000
SINCE_STEP_S = 30.0
ALERTS = 4
"""Of the run's two ranks, the stage and DCGM's exporter."""
GPUS = {"DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0x48, "DCGM_FI_DEV_XID_ERRORS": 79, "DCGM_FI_DEV_GPU_UTIL": 90}


class Watched(NamedTuple):
    prometheus: Prometheus
    at: float
    """Unix time that all queries are asked of."""
    last_step: float
    """Unix time that the exporters tell of the newest step."""

    def query(self, expression: str) -> list[Series]:
        return self.prometheus.query(expression, self.at)


def fill(exporter: Exporter, metrics: tuple[Metric, ...], growth: float, timestamp: float) -> None:
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
                series.set(timestamp if "timestamp" in metric.name else growth)


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


def all_answered(server: Prometheus, targets: int) -> float:
    """A Unix time by which each target has answered a scrape that began after this call, and none has failed since: a busy
    machine misses scrapes, whose series are gone until the next."""
    called = time.time()

    def found() -> float | None:
        newest = [series.value for series in server.query("timestamp(up)")]
        if len(newest) < targets:
            return None
        at = min(newest)  # nothing older than this is still to come
        scraped = [series.value for series in server.query("timestamp(up == 1)", at)]
        return at if len(scraped) == targets and min(scraped) > called else None

    at = server.until(found, "an answer of every target")
    assert isinstance(at, float)
    return at


@pytest.fixture
def watched(servers: Servers, tmp_path: Path) -> Iterator[Watched]:
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
        last_step = time.time() - SINCE_STEP_S
        for exporter, metrics in exporters:
            fill(exporter, metrics, 10, last_step)
        first, second = exporters[0][0], exporters[1][0]
        first.of(names.LOSS, "denoising").set(4)
        for exporter in (first, second):
            exporter.of(names.GOODPUT, "productive").inc(10)
        first.of(names.STEP).set(5)
        server = servers.prometheus({"scrape_configs": [loupe, dcgm]}, rules=[rules])
        targets = len(groups) + 1
        for _ in range(2):  # what they begin with is seen for longer than the second between two points of a subquery
            all_answered(server, targets)
        for _ in range(4):
            last_step = time.time() - SINCE_STEP_S
            for exporter, metrics in exporters[1:]:
                fill(exporter, metrics, 10, last_step)
            for metric, value in ((names.STEP, STEPS), (names.PLANNED_STEPS, STEPS_PLANNED)):
                second.of(metric).set(value)
            second.of(names.GOODPUT, "productive").inc(10)
            second.of(names.LOSS, "denoising").set(4)
            all_answered(server, targets)
        server.until(lambda: len(server.query('ALERTS{alertstate="firing"}')) == ALERTS, "the alerts")
        yield Watched(server, all_answered(server, targets), last_step)


OTHER_SPANS = {"offset 1m": "offset 1h", ":30s]": ":1s]", ":15s]": ":1s]", ":1m]": ":1s]"}
"""What of the queries must be finer than this test is long; and a mark of what is new stays for as long as its offset."""


def asked_of(watched: Watched, name: str) -> dict[str, list[list[Series]]]:
    """By panel, what each of its queries gives."""
    found: dict[str, list[list[Series]]] = {}
    for one in asked(FOLDER / f"{name}.json"):
        run = "demo" if name == "run" else ".*"
        expression = filled(one.expression, {**USUAL, "__rate_interval": "5m", "__range": "5m", "run": run})
        for usual, other in OTHER_SPANS.items():
            expression = expression.replace(usual, other)
        found.setdefault(one.panel, []).append(watched.query(expression))
    return found


def steps_a_second(watched: Watched) -> float:
    """The slope of the line through what Prometheus holds of the run's counted steps, a point each whole second."""
    end = math.floor(watched.at)
    answer = watched.prometheus.get(
        "/api/v1/query_range",
        query=f'max({names.STEPS.name}{{run="demo"}})', start=str(end - 1800), end=str(end), step="1",
    )  # fmt: skip
    times, counts = np.array(answer["data"]["result"][0]["values"], float).T
    return float(np.polyfit(times - times[0], counts, 1)[0])


@pytest.mark.ops
def test_every_query_gives_data_and_the_right_figures(watched: Watched) -> None:
    found = {name: asked_of(watched, name) for name in NAMES}
    for name, of_panels in found.items():
        for panel, results in of_panels.items():
            assert all(results), f"{name}, {panel} is empty"
            assert not any(math.isnan(series.value) for result in results for series in result), f"{name}, {panel}"

    def figure(name: str, panel: str, of: int = 0, **labels: str) -> float:
        values = [one.value for one in found[name][panel][of] if labels.items() <= one.labels.items()]
        assert len(values) == 1, f"{name}, {panel}: {found[name][panel]}"
        return values[0]

    assert figure("run", "State") == 2
    assert figure("run", "Alerts") == 2
    assert figure("run", "Step") == STEPS
    assert figure("run", "Done") == pytest.approx(STEPS / STEPS_PLANNED)
    assert figure("run", "Time left") == pytest.approx((STEPS_PLANNED - STEPS) / steps_a_second(watched))
    assert figure("run", "Last step") == pytest.approx(watched.at - watched.last_step)
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
