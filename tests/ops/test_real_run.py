"""A real Prometheus finds a real run of two ranks in its discovery folder, scrapes it while it trains, and every query of every
panel and every rule gives data from it; a killed rank leaves its figures right."""

import contextlib
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.dashboards.__main__ import FOLDER, NAMES
from ops.dashboards.asked import USUAL, asked, filled
from ops.prometheus.render import RULES, all_rules, each_rule
from tests.ops.dcgm import dcgm
from tests.ops.live_run import LiveRun, live_run
from tests.ops.stages import waiting_stage
from tests.prometheus_server import Prometheus, Servers
from trainer.config import CODE_ROOT
from trainer.goodput import newest_record
from trainer.goodput_keeper import WRITE_S
from trainer.metric_names import GOODPUT_STATES

pytestmark = pytest.mark.ops
FOLDER_OF_PROMETHEUS = CODE_ROOT / "ops" / "prometheus"
ELSEWHERE = {
    ("run", "Evaluations"): "only runs of autoencoders are evaluated",
}
"""Panels that a run like this one has nothing for, and why."""
OLDER = {"DCGM_FI_DEV_CLOCK_THROTTLE_REASONS"}
"""What exporters before DCGM 3.3 call another one."""
SLACK_S = 3.0
"""Between two scrapes, on a machine that is busy."""
WINDOW = {"__rate_interval": "6s", "__range": "5m", "run": "demo"}
"""Of the queries' variables; all else as it is in a dashboard."""


def config_for_tests(tmp_path: Path, discovery: Path, dcgm_port: int) -> dict[str, Any]:
    """ops/prometheus/prometheus.yml, but that it looks each second and finds folders and ports of this test."""
    text = (FOLDER_OF_PROMETHEUS / "prometheus.yml").read_text()
    text = re.sub(r"\b(15s|10s|1m)\b", "1s", text).replace("discovery/*.json", f"{discovery}/*.json")
    config: dict[str, Any] = yaml.safe_load(text)
    (tmp_path / "dcgm").mkdir(exist_ok=True)
    (tmp_path / "dcgm" / "gpus.json").write_text(json.dumps([{"targets": [f"127.0.0.1:{dcgm_port}"]}]))
    config["scrape_configs"][1]["file_sd_configs"][0]["files"] = [f"{tmp_path}/dcgm/*.json"]
    # its own server for runs on object storage is not part of this
    del config["scrape_configs"][0]["http_sd_configs"], config["alerting"]
    config["rule_files"] = [str(path) for path in RULES]
    return config


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, LiveRun]]:
    """A run in its third phase, a data stage and two GPUs, watched from the first moment."""
    tmp_path = tmp_path_factory.mktemp("real")
    discovery = tmp_path / "discovery"
    discovery.mkdir()
    with ExitStack() as stack:
        gpus = stack.enter_context(dcgm())
        prometheus = Servers(tmp_path, stack).prometheus(config_for_tests(tmp_path, discovery, gpus.port))
        run = stack.enter_context(live_run(
            tmp_path, "demo", "phases.low_resolution.steps=10", "phases.full_resolution.steps=6",
            "phases.perceptual.steps=100000", "checkpoint.every_steps=20", "metrics.straggler_steps=5",
            "metrics.sinks=[tensorboard]", "phases.perceptual.batch_size=4", "validation={every_steps: 40, count: 8}",
            discovery=discovery,
        ))  # fmt: skip
        stack.enter_context(waiting_stage(tmp_path, discovery))
        run.await_step(45)
        yield prometheus, run


def expressions() -> list[tuple[str, str, str]]:
    """(dashboard or `rules`, panel or rule, query). An annotation is a moment's: asked for over all the time."""
    found = []
    for name in NAMES:
        for one in asked(FOLDER / f"{name}.json"):
            query = filled(one.expression, {**USUAL, **WINDOW})
            over_all = f"count_over_time(({query})[15m:1s])"
            found.append((name, one.panel, over_all if one.panel.startswith("annotation ") else query))
    for rule in each_rule(all_rules()):
        if "record" in rule:
            found.append(("rules", rule["record"], rule["expr"]))
            found.append(("rules", f"{rule['record']}, recorded", rule["record"]))
        else:
            found += [("rules", rule["alert"], selector) for selector in selectors(rule["expr"])]
    return found


def selectors(expression: str) -> set[str]:
    """The series that an alert looks at. Whether it fires is another question: of a healthy run nothing does."""
    return set(re.findall(r"\b(?:loupe_|DCGM_FI_|run:|up\b)[A-Za-z0-9_:]*(?:\{[^}]*\})?", expression))


def test_selectors_of_an_alert() -> None:
    text = 'max by (run) (run:a:max{x=~"b|c"}[5m]) - loupe_b_total > 0 unless up{job="loupe"} or DCGM_FI_X / 8'
    assert selectors(text) == {'run:a:max{x=~"b|c"}', "loupe_b_total", 'up{job="loupe"}', "DCGM_FI_X"}


@pytest.mark.slow
def test_it_is_found_with_its_labels(watched: tuple[Prometheus, LiveRun]) -> None:
    prometheus, run = watched
    up = {one.labels["rank"]: one for one in prometheus.query('up{run="demo"}')}
    assert {rank: one.value for rank, one in up.items()} == {"0": 1.0, "1": 1.0}
    assert {one.labels["job"] for one in up.values()} == {"loupe"}
    assert len({one.labels["job_id"] for one in up.values()}) == 1
    assert [one.labels["rank"] for one in prometheus.query("loupe_step")] == ["0"]
    step = prometheus.value("loupe_step")
    assert abs(step - run.records()[-1]["step"]) < 60
    of_stages = math.fsum(one.value for one in prometheus.query('loupe_step_seconds_sum{stage!="total"}'))
    assert of_stages == pytest.approx(prometheus.value('loupe_step_seconds_sum{stage="total"}'), rel=0.05)


@pytest.mark.slow
def test_every_query_of_every_panel_and_rule_gives_data(watched: tuple[Prometheus, LiveRun]) -> None:
    prometheus, run = watched
    left = expressions()
    assert len(left) > 150, "they were found"

    def still_empty() -> list[tuple[str, str, str]]:
        left[:] = [one for one in left if not prometheus.query(one[2])]
        return [one for one in left if one[:2] not in ELSEWHERE and one[2] not in OLDER]

    with contextlib.suppress(AssertionError):
        prometheus.until(lambda: not still_empty(), "data for all", 60)
    empty = still_empty()
    assert not empty, "\n".join(f"{where}, {panel}: {query}" for where, panel, query in empty) + run.log()[-2000:]
    bad = [(rule["name"], rule.get("lastError")) for rule in prometheus.rules() if rule["health"] != "ok"]
    assert not bad


@pytest.mark.slow
def test_nothing_but_the_watchdog_fires_on_a_healthy_run(watched: tuple[Prometheus, LiveRun]) -> None:
    prometheus, _ = watched
    assert prometheus.until(prometheus.firing, "an alert") == {"Watchdog"}


def seen_goodput(prometheus: Prometheus) -> dict[str, float]:
    return {one.labels["state"]: one.value for one in prometheus.query("max by (state) (loupe_goodput_seconds_total)")}


def adds_up(prometheus: Prometheus, run: LiveRun) -> None:
    """What Prometheus has last scraped is the time from the run's first start until then, but for the ledger's interval."""
    record = newest_record(run.folder)
    assert record is not None
    at = prometheus.value("max(timestamp(loupe_goodput_seconds_total))")
    seen = seen_goodput(prometheus)
    assert set(seen) == set(GOODPUT_STATES)
    lag_s = at - record.first - record.idle_s - math.fsum(seen.values())
    assert -SLACK_S < lag_s < WRITE_S + SLACK_S


@pytest.mark.slow_ops
def test_a_killed_rank_leaves_the_figures_right(watched: tuple[Prometheus, LiveRun]) -> None:
    prometheus, run = watched
    adds_up(prometheus, run)
    before = {name: prometheus.value(f"max(loupe_{name}_total)") for name in ("steps", "images")}
    goodput = seen_goodput(prometheus)
    starts = len(run.folder.names("attempts"))
    os.kill(run.pids()[1], signal.SIGKILL)
    run.until(lambda: len(run.folder.names("attempts")) > starts, "another start")
    restarted = f'loupe_job_info{{run="demo", start="{starts}"}}'
    prometheus.until(lambda: prometheus.query(restarted), "a scrape of it")
    prometheus.until(lambda: prometheus.query("max(loupe_first_step_timestamp_seconds) > 0"), "a step")
    prometheus.until(lambda: prometheus.query(f"max(loupe_steps_total) > {before['steps']}"), "more steps than before")
    assert prometheus.value("max(loupe_images_total)") >= before["images"]
    # steps that were repeated count; those that stand do not count twice
    assert prometheus.value("max(loupe_steps_total)") >= prometheus.value("max(loupe_step)")
    assert prometheus.value('sum(max by (reason) (loupe_restarts_total{reason="crash"}))') == starts
    after = seen_goodput(prometheus)
    assert after["down"] > goodput["down"]
    assert all(after[state] >= goodput[state] - 0.5 for state in GOODPUT_STATES), "no counter went back"
    adds_up(prometheus, run)
