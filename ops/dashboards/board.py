"""A whole dashboard of panels: variables, annotations, links, and everything's place on the grid."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from ops.dashboards.kit import DATASOURCE, RUNBOOK, RUNBOOK_URL, TAG, WIDTH, PanelBuilder


@dataclass(frozen=True)
class Section:
    """Panels below a headline, from the left to the right and then below."""

    title: str
    panels: Sequence[PanelBuilder]


@dataclass(frozen=True)
class Mark:
    """A vertical line in all charts where `expression` gives something."""

    name: str
    expression: str
    title: str
    """With {{label}} for a label's value."""
    color: str


class _Annotation(models.AnnotationQuery):
    """Prometheus' own fields of an annotation, which the SDK's type lacks."""

    title_format: str = ""

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "titleFormat": self.title_format, "step": "60s"}


def variable(name: str, label: str, series: str, *, of: str = "", many: bool = True) -> dashboard.QueryVariable:
    """Choose among the values of a label.

    Args:
        series: whose label it is.
        of: the label; its name is the variable's where this is empty.
        many: several may be chosen, and all are at first.
    """
    query: dict[str, object] = {"query": f"label_values({series}, {of or name})", "refId": f"variable-{name}"}
    built = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_CASE_INSENSITIVE_ASC)
        .multi(many)
        .include_all(many)
    )
    if many:
        built.all_value(".*").current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    return built


def text(name: str, label: str, value: str, description: str) -> dashboard.TextBoxVariable:
    option = models.VariableOption(selected=True, text=value, value=value)
    return (
        dashboard.TextBoxVariable(name)
        .label(label)
        .description(description)
        .default_value(value)
        .current(option)
        .options([option])
    )


def board(
    *,
    uid: str,
    title: str,
    description: str,
    sections: Sequence[Section],
    variables: Sequence[dashboard.QueryVariable | dashboard.TextBoxVariable] = (),
    marks: Sequence[Mark] = (),
    since: str = "now-6h",
) -> models.Dashboard:
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .readonly()
        .refresh("30s")
        .time(since, "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for one in variables:
        built.with_variable(one)
    words = "Where ops/RUNBOOK.md can be read in a browser; the panels' links lead there."
    built.with_variable(text("runbook", "Runbook", RUNBOOK_URL, words).hide(models.VariableHide.HIDE_VARIABLE))
    built.link(
        dashboard.DashboardLink("Loupe")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .keep_time(True)
        .include_vars(True)
        .icon("external link")
    )
    built.link(
        dashboard.DashboardLink("Runbook")
        .type(models.DashboardLinkType.LINK)
        .url(RUNBOOK)
        .icon("doc")
        .target_blank(True)
    )
    whole = built.build()
    whole.panels = placed(sections)
    found = []
    for mark in marks:
        query = _Annotation(
            name=mark.name, datasource=DATASOURCE, enable=True, icon_color=mark.color, expr=mark.expression
        )
        query.title_format = mark.title
        found.append(query)
    whole.annotations = models.AnnotationContainer(list_val=list(found))
    return whole


def placed(sections: Sequence[Section]) -> list[models.Panel | models.RowPanel]:
    """Each panel at its place, its number counted on. A panel that does not fit into the line begins the next one."""
    found: list[models.Panel | models.RowPanel] = []
    top = 0
    for section in sections:
        at = models.GridPos(h=1, w=WIDTH, x=0, y=top)
        found.append(models.RowPanel(title=section.title, grid_pos=at, id_val=len(found) + 1))
        left, top, tallest = 0, top + 1, 0
        for builder in section.panels:
            panel = builder.build()
            assert panel.grid_pos is not None
            if left + panel.grid_pos.w > WIDTH:
                left, top, tallest = 0, top + tallest, 0
            panel.grid_pos.x, panel.grid_pos.y = left, top
            panel.id_val = len(found) + 1
            left, tallest = left + panel.grid_pos.w, max(tallest, panel.grid_pos.h)
            found.append(panel)
        top += tallest
    return found


def as_json(whole: models.Dashboard) -> str:
    return json.dumps(whole, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def tree(whole: models.Dashboard) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(as_json(whole))
    return found
