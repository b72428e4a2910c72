"""The dashboards' JSON: what the code builds, and what Grafana and Prometheus will take."""

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from ops.dashboards.__main__ import FOLDER, NAMES, built
from ops.dashboards.asked import USUAL, asked, filled, panels
from ops.dashboards.board import tree
from trainer import metric_names

OPS = FOLDER.parent
RETIRED = {"graph", "singlestat", "table-old", "grafana-piechart-panel", "grafana-worldmap-panel"}
TYPES = {"stat", "timeseries", "bargauge", "table"}
BOARDS = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES}


@pytest.fixture(params=NAMES)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BOARDS[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_json_is_what_the_code_builds(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == built(name), "run python -m ops.dashboards"


@pytest.mark.parametrize("name", NAMES)
def test_json_is_of_the_sdks_types(name: str) -> None:
    """Read back by Grafana's own types nothing is lost: each field has its right name and place."""
    board = BOARDS[name]
    again = tree(Dashboard.from_json(board))
    for mark in board["annotations"]["list"]:  # the SDK's type of an annotation has less than Prometheus' has
        assert {"titleFormat", "step"} <= mark.keys()
        del mark["titleFormat"], mark["step"]
    assert again == board


def test_file_names_and_uids() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    uids = [board["uid"] for board in BOARDS.values()]
    assert len(set(uids)) == len(uids)
    assert all(re.fullmatch(r"[a-z-]{8,40}", uid) for uid in uids)


def test_panels_fit_the_grid(board: dict[str, Any]) -> None:
    places = [(panel["id"], panel["gridPos"]) for panel in board["panels"]]
    assert len({number for number, _ in places}) == len(places)
    for _, at in places:
        assert at["x"] >= 0
        assert at["w"] > 0
        assert at["h"] > 0
        assert at["x"] + at["w"] <= 24
    for (first, a), (second, b) in combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"panels {first} and {second} overlap"


def test_every_line_of_the_grid_is_full(board: dict[str, Any]) -> None:
    """No hole between panels: the area of a section is that of its panels."""
    tops = [panel["gridPos"]["y"] for panel in board["panels"] if panel["type"] == "row"]
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    for top, end in zip(tops, [*tops[1:], bottom], strict=True):
        inside = [panel["gridPos"] for panel in board["panels"] if top <= panel["gridPos"]["y"] < end]
        assert sum(at["w"] * at["h"] for at in inside) == 24 * (end - top), f"a hole below y = {top}"


def known_units() -> set[str]:
    return {value for name, value in vars(units).items() if not name.startswith("_") and isinstance(value, str)}


def test_every_panel_says_what_it_is(board: dict[str, Any]) -> None:
    units_known = known_units()
    for panel in panels(board):
        assert panel["type"] in TYPES - RETIRED, panel["title"]
        assert len(panel["description"]) >= 8, panel["title"]
        assert panel["description"].endswith((".", "?")), panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in units_known or defaults["unit"].startswith("suffix: "), panel["title"]
        assert defaults["noValue"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for query in panel["targets"]:
            assert query["datasource"] == panel["datasource"]
        assert len({query["refId"] for query in panel["targets"]}) == len(panel["targets"])


def test_titles_are_unique_within_a_section(board: dict[str, Any]) -> None:
    seen: set[tuple[str, str]] = set()
    for panel in board["panels"]:
        if panel["type"] == "row":
            seen = set()
            continue
        assert (panel["title"], panel["type"]) not in seen or panel["title"] == "Memory in use"
        seen.add((panel["title"], panel["type"]))


def test_tables_show_fields_that_their_queries_have(board: dict[str, Any]) -> None:
    """A label that is grouped away, or a column that no query is called by, would be an empty column."""
    for panel in panels(board):
        if panel["type"] != "table":
            continue
        transformations = {one["id"]: one["options"] for one in panel["transformations"]}
        fields = transformations["filterFieldsByName"]["include"]["names"]
        titles = transformations["organize"]["renameByName"]
        assert titles.keys() == set(fields)
        overrides = {one["matcher"]["options"] for one in panel["fieldConfig"]["overrides"]}
        assert set(titles.values()) <= overrides
        several = len(panel["targets"]) > 1
        values = {f"Value #{query['refId']}" if several else "Value" for query in panel["targets"]}
        all_text = " ".join(query["expr"] for query in panel["targets"])
        for name in fields:
            if not name.startswith("Value"):
                of_info = {"recipe", "cluster", "start", "host", "folder", "job_id", "run"}
                kept = re.search(rf"(by|group_left) \([^)]*\b{name}\b", all_text)
                assert kept or (name in of_info and metric_names.JOB.name in all_text), f"{panel['title']}: {name}"
        assert {name for name in fields if name.startswith("Value")} <= values
        for query in panel["targets"]:
            assert query["format"] == "table"
            assert query["instant"]


def names_in(expression: str) -> set[str]:
    """Metric names: words before { or that nothing follows like a call; PromQL's own words left out."""
    without = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', " ", expression)
    without = re.sub(r"\b(by|on|ignoring|group_left|group_right|without)\s*\([^)]*\)", " ", without)
    words = set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*(?!\s*\()\b", re.sub(r"[A-Za-z_]+\s*\(", "(", without)))
    return words - {"or", "and", "unless", "on", "bool", "offset", "m", "e", "group_left", "by", "h", "s"}


def exported() -> set[str]:
    found = set()
    for metric in metric_names.ALL:
        parts = {"histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}.get(metric.kind, ("",))
        found |= {metric.name + part for part in parts}
    return found


def recorded() -> set[str]:
    """Names that recording rules make."""
    files = (OPS / "prometheus" / "rules").glob("*.yaml")
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def dcgm() -> set[str]:
    lines = (OPS / "grafana" / "dcgm-counters.csv").read_text().splitlines()
    listed = {line.split(",")[0] for line in lines if line.startswith("DCGM_")}
    return listed | {"DCGM_FI_DEV_CLOCK_THROTTLE_REASONS"}


@pytest.mark.parametrize("name", NAMES)
def test_queries_name_only_metrics_that_exist(name: str) -> None:
    known = exported() | recorded() | dcgm() | {"up", "ALERTS", "ALERTS_FOR_STATE"}
    for one in asked(FOLDER / f"{name}.json"):
        unknown = names_in(filled(one.expression, {**USUAL, "run": "demo"})) - known
        assert not unknown, f"{one.panel}: {unknown} in {one.expression}"


def test_labels_in_queries_are_the_metrics_own() -> None:
    """A matcher on a label that a metric does not have never matches, and nobody sees why."""
    of_targets = {"run", "job_id", "node", "rank", "job", "instance"}
    labels = {metric.name: set(metric.labels) for metric in metric_names.ALL}
    labels |= {f"{metric.name}_info": set() for metric in metric_names.ALL if metric.kind == "info"}
    for metric in metric_names.ALL:
        if metric.kind == "histogram":
            labels |= {f"{metric.name}_{part}": {*metric.labels, "le"} for part in ("bucket", "sum", "count")}
    for name in NAMES:
        for one in asked(FOLDER / f"{name}.json"):
            for metric_name, selector in re.findall(r"(loupe_\w+)\{([^}]*)\}", one.expression):
                used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)))
                assert used <= labels[metric_name] | of_targets, f"{one.panel}: {one.expression}"


def test_links_lead_to_sections_of_the_runbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (OPS / "RUNBOOK.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\$\{runbook\}#([\w-]+)", json.dumps(BOARDS)))
    assert len(linked) > 20
    assert linked <= anchors


def test_every_metric_is_shown_somewhere() -> None:
    every = " ".join(one.expression for name in NAMES for one in asked(FOLDER / f"{name}.json"))
    missing = {metric.name for metric in metric_names.ALL if metric.name not in every}
    assert not missing


def test_variables(board: dict[str, Any]) -> None:
    """Each that is used is there, and asks for a label of a metric that exists."""
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert next(iter(variables)) == "datasource"
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board["panels"]))) - {"datasource"}
    used = {name for name in used if not name.startswith("__")}
    assert used <= variables.keys()
    for one in variables.values():
        if one["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", one["query"]["query"])
            assert match, one["query"]
            assert match[1] in exported() | dcgm()
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_rates_are_over_the_interval_that_grafana_knows(board: dict[str, Any]) -> None:
    """A fixed window shorter than four scrapes gives holes."""
    for panel in panels(board):
        for query in panel["targets"]:
            for window in re.findall(r"rate\([^()]*\[([^]]+)\]", query["expr"]):
                assert window in ("$__rate_interval", "30m"), panel["title"]


def test_one_series_has_one_colour() -> None:
    colors: dict[str, set[str]] = {}
    for board in BOARDS.values():
        for panel in panels(board):
            for override in panel["fieldConfig"]["overrides"]:
                for found in override["properties"]:
                    if found["id"] == "color" and "fixedColor" in found["value"] and panel["type"] != "table":
                        colors.setdefault(override["matcher"]["options"], set()).add(found["value"]["fixedColor"])
    both = {"data", "restore", "compile"}  # a stage of a step, a state of a run, a part of a start
    assert {name for name, found in colors.items() if len(found) > 1} <= both
    for state in metric_names.GOODPUT_STATES + metric_names.STAGES:
        assert state in colors


@pytest.mark.ops
def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    """As recording rules, which promtool parses."""
    every = [one for name in NAMES for one in asked(FOLDER / f"{name}.json")]
    rules = [
        {"record": f"checked:{i}", "expr": filled(one.expression, {**USUAL, "run": "demo"})}
        for i, one in enumerate(every)
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=none", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout
