"""The rules in other forms: a PrometheusRule for Kubernetes, another runbook's address, shortened for tests. No torch."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import yaml

FOLDER = Path(__file__).parent
RULES = tuple(sorted(FOLDER.glob("rules/*.yaml")))
TESTS = tuple(sorted(FOLDER.glob("tests/*.yaml")))
RUNBOOK_URL = "https://example.org/loupe/ops/RUNBOOK.md"
"""As the rules have it."""
_SPAN = re.compile(r"(?<=\[)\d+[smhd](?=\])|(?<=\boffset )\d+[smhd]\b")
_MINUTES = re.compile(r"\b(\d+) \* 60\b(?: \* 60\b)?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Rules = dict[str, Any]
"""A rules file as a tree."""


def all_rules() -> Rules:
    """The groups of all files, as one."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return {"groups": groups}


def each_rule(rules: Rules) -> Iterator[dict[str, Any]]:
    for group in rules["groups"]:
        yield from group["rules"]


def with_runbook(rules: Rules, url: str) -> Rules:
    """The same with the runbook at `url`."""
    found = deepcopy(rules)
    for rule in each_rule(found):
        if "alert" in rule:
            annotations = rule["annotations"]
            annotations["runbook_url"] = annotations["runbook_url"].replace(RUNBOOK_URL, url, 1)
    return found


def shortened(rules: Rules, factor: float) -> Rules:
    """The same with all times divided by `factor`: windows, offsets, `for`, spans written `N * 60` in expressions. For tests
    on real servers that cannot wait for hours; scrape as much more often."""
    found = deepcopy(rules)
    for rule in each_rule(found):
        rule["expr"] = _SPAN.sub(lambda match: _divided(match[0], factor), rule["expr"])
        rule["expr"] = _MINUTES.sub(lambda match: f"({match[0]} / {factor:g})", rule["expr"])
        if "for" in rule:
            rule["for"] = _divided(rule["for"], factor)
    return found


def _divided(span: str, factor: float) -> str:
    return f"{max(1, round(1000 * int(span[:-1]) * _UNITS[span[-1]] / factor))}ms"


def prometheus_rule(rules: Rules, *, namespace: str | None = None, labels: Mapping[str, str] | None = None) -> Rules:
    """A PrometheusRule of the Prometheus operator."""
    metadata: dict[str, Any] = {"name": "loupe"} | ({"namespace": namespace} if namespace else {})
    metadata["labels"] = {"app.kubernetes.io/name": "loupe", **(labels or {})}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": rules}


@click.command(context_settings={"show_default": True})
@click.option("--namespace", help="Of the object; without it, the one that kubectl is set to.")
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="As your Prometheus selects rules. Repeatable."
)
@click.option("--runbook", default=RUNBOOK_URL, metavar="URL", help="Where ops/RUNBOOK.md can be read.")
@click.option("--plain", is_flag=True, help="A rules file of Prometheus instead.")
def main(namespace: str | None, labels: tuple[str, ...], runbook: str, plain: bool) -> None:
    """Print Loupe's rules as a PrometheusRule for Kubernetes.

    \b
    Examples:
      python -m ops.prometheus.render --label release=kube-prometheus-stack | kubectl apply -f -
      python -m ops.prometheus.render --plain --runbook https://wiki.example.org/loupe > rules.yaml
    """
    pairs = [label.partition("=") for label in labels]
    if bad := [name for name, equals, _ in pairs if not (name and equals)]:
        raise click.BadParameter(f"{bad[0]!r} is not NAME=VALUE", param_hint="--label")
    rules = with_runbook(all_rules(), runbook)
    if not plain:
        rules = prometheus_rule(rules, namespace=namespace, labels={name: value for name, _, value in pairs})
    click.echo(yaml.dump(rules, Dumper=_Dumper, sort_keys=False, width=120), nl=False)


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    main()
