"""Rules, their tests, the runbook and Alertmanager's example belong together; promtool and amtool find nothing wrong."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ops.dashboards.kit import RUNBOOK_URL as RUNBOOK_OF_PANELS
from ops.dashboards.kit import STAGE_COLORS
from ops.prometheus import render
from ops.prometheus.render import RULES, TESTS, all_rules, each_rule
from trainer import metric_names

ROOT = Path(__file__).parents[3]
RUNBOOK = (ROOT / "ops/RUNBOOK.md").read_text(encoding="utf-8")
ALERTMANAGER = ROOT / "ops/alertmanager/alertmanager.yml"
ALERTS = [rule for rule in each_rule(all_rules()) if "alert" in rule]
RECORDED = {rule["record"]: rule["expr"] for rule in each_rule(all_rules()) if "record" in rule}
COUNTERS = ROOT / "ops/grafana/dcgm-counters.csv"
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "info": ("_info",), "counter": ("",), "gauge": ("",)}
EXPORTED = {f"{metric.name}{suffix}" for metric in metric_names.ALL for suffix in _SUFFIXES[metric.kind]}


def names_in(expression: str) -> set[str]:
    """Metrics that an expression asks for."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:run:[a-z_]+:[a-z]+|(?<!:)(?:loupe|DCGM)_\w+|up)\b", without_strings))


def slug(heading: str) -> str:
    """GitHub's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


SECTIONS = {
    slug(title): text for title, text in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_needed(alert: dict[str, Any]) -> None:
    name, annotations = alert["alert"], alert["annotations"]
    assert alert["labels"]["severity"] in ("critical", "warning", "none")
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert name == "Watchdog" or "$value" in annotations["description"], "a description with values"
    url, _, anchor = annotations["runbook_url"].partition("#")
    assert url == render.RUNBOOK_URL == RUNBOOK_OF_PANELS
    section = SECTIONS[anchor]
    assert name == "Watchdog" or f"`{name}`, {alert['labels']['severity']}" in section
    assert "Look" in section
    assert "Do: " in section or "Look and do: " in section


def test_each_section_of_the_runbook_is_of_an_alert() -> None:
    assert set(SECTIONS) == {alert["annotations"]["runbook_url"].partition("#")[2] for alert in ALERTS}
    assert len(ALERTS) == len({alert["alert"] for alert in ALERTS}) == len(SECTIONS)
    links = re.findall(r"\]\(#([\w-]+)\)", RUNBOOK)
    assert set(links) <= set(SECTIONS), "links within the runbook lead somewhere"


def test_rules_ask_for_nothing_that_nobody_exports() -> None:
    of_gpus = set(re.findall(r"\bDCGM_\w+", COUNTERS.read_text(encoding="utf-8")))
    known = EXPORTED | of_gpus | set(RECORDED) | {"up"}
    for rule in each_rule(all_rules()):
        texts = [rule["expr"], *re.findall(r"printf `(.*?)`", str(rule.get("annotations", "")))]
        found = set().union(*(names_in(text) for text in texts))
        assert found or rule["expr"] == "vector(1)", rule
        assert found <= known, rule
    for expression in RECORDED.values():
        assert not names_in(expression) & set(RECORDED), "a record of a record would lag behind"
    asked = set().union(*(names_in(alert["expr"]) for alert in ALERTS))
    assert set(RECORDED) <= asked, "each record serves an alert"


def test_series_that_rules_select_by_label_exist() -> None:
    """A label's value that no metric has would never match, and never tell."""
    values = {
        "state": {*metric_names.GOODPUT_STATES, *metric_names.STAGE_ITEM_STATES},
        "stage": {*STAGE_COLORS, "total"}, "stat": {"min", "mean", "max"}, "term": {"loss"},
        "operation": {"save", "restore"}, "reason": {"non_finite", "spike"}, "job": {"loupe"},
    }  # fmt: skip
    for rule in each_rule(all_rules()):
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', rule["expr"]):
            assert set(value.split("|")) <= values[label], f"{label}={value} in {rule['expr']}"


def test_growth_over_restarts_is_never_asked_of_one_address() -> None:
    """A counter of the run goes on at another address: increase() and rate() are for those that begin anew with a process."""
    of_processes = {
        "loupe_data_fetch_errors_total", "loupe_discovery_failures_total", "loupe_sink_failures_total",
        "loupe_data_stage_worker_deaths_total",
    }  # fmt: skip
    for rule in each_rule(all_rules()):
        for name in re.findall(r"(?:increase|rate|delta)\((\S+?)[\[{]", rule["expr"]):
            assert name in of_processes, rule["expr"]


def test_each_alert_has_a_test_that_it_fires() -> None:
    expected = set()
    for path in TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for query in test["promql_expr_test"]:
                for sample in query["exp_samples"]:
                    expected |= set(re.findall(r'alertname="(\w+)"', sample["labels"]))
    assert expected == {alert["alert"] for alert in ALERTS}


def promtool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.mark.ops
def test_promtool_accepts_the_rules_and_each_alert_fires_by_its_fault_and_not_without() -> None:
    checked = promtool("check", "rules", *RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", *TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.ops
def test_annotations_are_filled_in(tmp_path: Path) -> None:
    """promtool is told to expect no alerts, and prints those that it got, with their annotations."""
    for path in TESTS:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        test = tree["tests"][0]
        fired = sorted(
            {name for query in test["promql_expr_test"] if query["eval_time"] == "4h" for sample in query["exp_samples"]
             for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
        )  # fmt: skip
        test["promql_expr_test"] = []
        test["alert_rule_test"] = [{"eval_time": "4h", "alertname": name, "exp_alerts": []} for name in fired]
        tree["rule_files"] = [str(path.parent / name) for name in tree["rule_files"]]
        copy = tmp_path / path.name
        copy.write_text(yaml.safe_dump(tree))
        said = promtool("test", "rules", copy)
        words = said.stdout + said.stderr
        assert words.count("Annotations:{") >= len(fired), words
        for wrong in ("error expanding", "<no value>", "<error", "runbook_url=\\"):
            assert wrong not in words, words


@pytest.mark.ops
def test_the_printed_forms_are_rules_too(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    printed = CliRunner().invoke(render.main, ["--plain", "--runbook", "https://wiki.example.org/loupe"])
    path.write_text(printed.output)
    assert promtool("check", "rules", path).returncode == 0, printed.output
    assert printed.output.count("https://wiki.example.org/loupe#") == len(ALERTS)
    path.write_text(yaml.safe_dump(render.shortened(all_rules(), 60)))
    short = promtool("check", "rules", path)
    assert short.returncode == 0, short.stdout + short.stderr


def test_a_prometheus_rule_for_kubernetes() -> None:
    printed = CliRunner().invoke(render.main, ["--namespace", "training", "--label", "release=stack"])
    tree = yaml.safe_load(printed.output)
    assert (tree["apiVersion"], tree["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert tree["metadata"] == {
        "name": "loupe", "namespace": "training", "labels": {"app.kubernetes.io/name": "loupe", "release": "stack"}
    }  # fmt: skip
    assert tree["spec"] == all_rules()
    refused = CliRunner().invoke(render.main, ["--label", "release"])
    assert refused.exit_code == 2
    assert "NAME=VALUE" in refused.output


def test_shortened_divides_every_time() -> None:
    rules = {"groups": [{"rules": [{"alert": "A", "for": "30m", "expr": (
        "max_over_time(x[1h]) - y offset 15m > 2 * 60 * 60 and 20 * z > 10 * 60 unless last_over_time(w[1d] offset 1h)"
    )}]}]}  # fmt: skip
    [short] = each_rule(render.shortened(rules, 60))
    assert short["for"] == "30000ms"
    assert short["expr"] == (
        "max_over_time(x[60000ms]) - y offset 15000ms > (2 * 60 * 60 / 60) and 20 * z > (10 * 60 / 60) "
        "unless last_over_time(w[1440000ms] offset 60000ms)"
    )
    assert rules["groups"][0]["rules"][0]["for"] == "30m", "the rules given stay as they are"


@pytest.mark.ops
@pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed")
def test_alertmanagers_example() -> None:
    checked = subprocess.run(["amtool", "check-config", ALERTMANAGER], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    def receiver(**labels: str) -> str:
        command = ["amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}"]
        command += [f"{name}={value}" for name, value in labels.items()]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    assert receiver(alertname="Watchdog", severity="none") == "heartbeat"
    assert receiver(alertname="LoupeNoProgress", severity="critical", run="demo") == "page"
    assert receiver(alertname="LoupeDataWait", severity="warning", run="demo") == "chat"


def test_alertmanagers_example_keeps_no_secret_and_names_alerts_that_there_are() -> None:
    text = ALERTMANAGER.read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    assert not re.search(
        r"^\s*(api_url|routing_key|auth_password|password|bearer_token|credentials):", text, re.MULTILINE
    )
    names = {alert["alert"] for alert in ALERTS}
    matchers = [
        one for rule in tree["inhibit_rules"] for side in ("source_matchers", "target_matchers") for one in rule[side]
    ]
    matchers += [one for route in tree["route"]["routes"] for one in route["matchers"]]
    for matcher in matchers:
        label, how, value = re.fullmatch(r'(\w+)(=~|!=|=)"(.*)"', matcher).groups()  # type: ignore[union-attr]
        if label == "alertname":
            assert any(re.fullmatch(value, name) if how == "=~" else value == name for name in names), matcher
