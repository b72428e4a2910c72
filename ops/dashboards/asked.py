"""What a dashboard asks Prometheus, read from its JSON: for tests, which ask it of a real one."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

USUAL = {
    "__rate_interval": "1m", "__interval": "15s", "__range": "6h", "datasource": "prometheus", "run": ".*", "job": ".*",
    "rank": ".*", "stage": ".*", "node": ".*", "gpu": ".*",
}  # fmt: skip
"""Values of variables; where a chart is of one run alone, `run` must be its name."""


class Asked(NamedTuple):
    dashboard: str
    panel: str
    """Its title; of an annotation or a variable, that and its name."""
    expression: str
    """With variables."""


def panels(board: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All but rows, those within collapsed rows too."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def asked(path: Path) -> list[Asked]:
    """Of a dashboard's file: the queries of all panels and annotations."""
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    title = board["title"]
    found = [Asked(title, panel["title"], query["expr"]) for panel in panels(board) for query in panel["targets"]]
    found += [Asked(title, f"annotation {mark['name']}", mark["expr"]) for mark in board["annotations"]["list"]]
    return found


def filled(expression: str, values: Mapping[str, str]) -> str:
    """With the variables' values in place of their names.

    Raises:
        KeyError: a variable has none.
    """
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], expression)
