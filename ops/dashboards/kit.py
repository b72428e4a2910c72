"""What all dashboards share: panels with the house's look, variables, colours, and the grid.

Built by grafana-foundation-sdk, whose types are Grafana 10.1's; later ones load the same JSON. A panel's `mend` is the section
of ops/RUNBOOK.md that it links to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphDrawStyle,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

WIDTH = 24
"""Columns of Grafana's grid."""
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNBOOK = "${runbook}"
"""URL of ops/RUNBOOK.md as it is rendered somewhere; a variable of each dashboard."""
RUNBOOK_URL = "https://example.org/loupe/ops/RUNBOOK.md"
TAG = "loupe"

GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
STAGE_COLORS = {
    "data": "#E0B400", "copy": "#FFCB7D", "encode": "#8AB8FF", "text": "#5794F2", "forward": "#3274D9",
    "perceptual_loss": "#B877D9", "backward": "#1F60C4", "optimizer": "#37872D", "average": "#96D98D",
    "checkpoint": "#FF780A", "other": "#8E8E8E",
}  # fmt: skip
STATE_COLORS = {
    "productive": "#37872D", "init": "#8AB8FF", "compile": "#5794F2", "data": "#E0B400", "checkpoint": "#FF780A",
    "restore": "#FFB357", "rework": "#B877D9", "hang": "#C4162A", "down": "#FF7383", "other": "#8E8E8E",
}  # fmt: skip
TERM_COLORS = {
    "loss": "#CCCCDC", "denoising": "#3274D9", "denoising_weighted": "#8AB8FF", "lpl": "#B877D9", "gate": "#E0B400",
    "perceptual share": "#B877D9",
}  # fmt: skip
STAT_COLORS = {"min": "#96D98D", "mean": "#3274D9", "max": "#FF780A"}


class PanelBuilder(Protocol):
    def build(self) -> models.Panel: ...


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str = ""
    """Of a table: the name of its column."""
    hidden: bool = False


Steps = Sequence[tuple[float | None, str]]
"""From which value on a colour is shown; the first's is None."""


@dataclass(frozen=True)
class Look:
    """What a panel says besides its queries."""

    title: str
    description: str
    unit: str
    width: int = 8
    height: int = 8
    mend: str = ""
    """Heading of ops/RUNBOOK.md, as an anchor."""
    steps: Steps = ((None, GREEN),)
    minimum: float | None = None
    maximum: float | None = None
    decimals: int | None = None
    none: str = "no data"
    """Shown where a query gives nothing."""
    colors: Mapping[str, str] = field(default_factory=dict)
    """By the name of a series."""
    links: Sequence[tuple[str, str]] = ()
    """(title, URL)."""


def target(query: Query, index: int, *, instant: bool = False, as_table: bool = False) -> prometheus.Dataquery:
    built = (
        prometheus.Dataquery()
        .datasource(DATASOURCE)
        .expr(query.expression)
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + index))
        .format(PromQueryFormat.TABLE if as_table else PromQueryFormat.TIME_SERIES)
    )
    if query.hidden:
        built.hide(True)
    return built.instant() if instant else built.range()


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    found = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _color(mode: models.FieldColorModeId, fixed: str | None = None) -> dashboard.FieldColor:
    color = dashboard.FieldColor().mode(mode)
    return color.fixed_color(fixed) if fixed else color


def _fixed(color: str) -> dict[str, str]:
    return {"mode": "fixed", "fixedColor": color}


def _link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url).target_blank(True)


def _dressed(panel: Any, look: Look) -> Any:
    panel.title(look.title).description(look.description).datasource(DATASOURCE).unit(look.unit).no_value(look.none)
    panel.height(look.height).span(look.width).thresholds(_thresholds(look.steps))
    links = [_link("What to do: runbook", f"{RUNBOOK}#{look.mend}")] if look.mend else []
    panel.links(links + [_link(title, url) for title, url in look.links])
    if look.minimum is not None:
        panel.min(look.minimum)
    if look.maximum is not None:
        panel.max(look.maximum)
    if look.decimals is not None:
        panel.decimals(look.decimals)
    for name, color in look.colors.items():
        panel.override_by_name(name, [models.DynamicConfigValue("color", _fixed(color))])
    return panel


def number(
    look: Look,
    expression: str,
    *,
    mappings: Sequence[models.ValueMap] = (),
    sparkline: bool = False,
    solid: bool = False,
) -> PanelBuilder:
    """One large figure of now, coloured by `look.steps`."""
    panel = _dressed(stat.Panel(), look)
    panel.with_target(target(Query(expression), 0, instant=not sparkline))
    panel.graph_mode(BigValueGraphMode.AREA if sparkline else BigValueGraphMode.NONE)
    panel.color_mode(BigValueColorMode.BACKGROUND if solid else BigValueColorMode.VALUE)
    panel.color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    panel.reduce_options(_last())
    if mappings:
        panel.mappings(list(mappings))
    return _built(panel)


def curves(
    look: Look,
    *queries: Query,
    stacked: bool = False,
    share: bool = False,
    log: bool = False,
    bars: bool = False,
    limits: bool = False,
    points: bool = False,
) -> PanelBuilder:
    """Lines over time.

    Args:
        stacked: areas on each other; `share`: of their sum.
        log: the axis.
        limits: `look.steps` are drawn as lines.
        points: single ones are drawn: of what is rare.
    """
    panel = _dressed(timeseries.Panel(), look)
    for i, query in enumerate(queries):
        panel.with_target(target(query, i))
    panel.draw_style(GraphDrawStyle.BARS if bars else GraphDrawStyle.LINE).line_width(1)
    panel.fill_opacity(60 if stacked or share or bars else 6)
    panel.show_points(VisibilityMode.ALWAYS if points else VisibilityMode.NEVER)
    panel.color_scheme(_color(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    if stacked or share:
        mode = StackingMode.PERCENT if share else StackingMode.NORMAL
        panel.stacking(common.StackingConfig().mode(mode).group("A"))
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if limits:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel.legend(legend.show_legend(True).calcs([]))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    return _built(panel)


def bars(look: Look, *queries: Query) -> PanelBuilder:
    """A bar a series, of now."""
    panel = _dressed(bargauge.Panel(), look)
    for i, query in enumerate(queries):
        panel.with_target(target(query, i, instant=True))
    panel.orientation(VizOrientation.HORIZONTAL).display_mode(common_models.BarGaugeDisplayMode.BASIC)
    mode = models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME if look.colors else models.FieldColorModeId.THRESHOLDS
    panel.color_scheme(_color(mode)).reduce_options(_last())
    return _built(panel)


@dataclass(frozen=True)
class Column:
    """Of a table; `name` as the query's `legend`, or a label."""

    name: str
    title: str
    unit: str = "short"
    steps: Steps = ()
    mappings: Sequence[models.ValueMap] = ()
    link: tuple[str, str] | None = None
    """(title, URL)."""
    decimals: int | None = None
    width: int | None = None


def rows(
    look: Look, columns: Sequence[Column], *queries: Query, by: str, sort: str = "", descending: bool = False
) -> PanelBuilder:
    """A table of now: a row for each value of label `by`, which all queries have; other columns are left out."""
    panel = _dressed(table.Panel(), look)
    for i, query in enumerate(queries):
        panel.with_target(target(query, i, instant=True, as_table=True))
    column_of = {
        query.legend: f"Value #{chr(ord('A') + i)}" if len(queries) > 1 else "Value" for i, query in enumerate(queries)
    }
    fields = [column_of.get(column.name, column.name) for column in columns]
    if len(queries) > 1:
        panel.with_transformation(models.DataTransformerConfig("joinByField", options={"byField": by, "mode": "outer"}))
    panel.with_transformation(
        models.DataTransformerConfig("filterFieldsByName", options={"include": {"names": fields}})
    )
    panel.with_transformation(
        models.DataTransformerConfig(
            "organize",
            options={
                "excludeByName": {},
                "indexByName": {name: i for i, name in enumerate(fields)},
                "renameByName": {name: column.title for name, column in zip(fields, columns, strict=True)},
            },
        )
    )
    for column in columns:
        panel.override_by_name(column.title, _properties(column))
    panel.show_header(True)
    if sort:
        panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(descending)])
    return _built(panel)


def _properties(column: Column) -> list[models.DynamicConfigValue]:
    found = [models.DynamicConfigValue("unit", column.unit)]
    if column.steps:
        steps = [{"value": value, "color": color} for value, color in column.steps]
        found.append(models.DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps}))
        found.append(models.DynamicConfigValue("color", {"mode": "thresholds"}))
        found.append(models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
    if column.mappings:
        found.append(models.DynamicConfigValue("mappings", [mapping.to_json() for mapping in column.mappings]))
    if column.link:
        title, url = column.link
        found.append(models.DynamicConfigValue("links", [{"title": title, "url": url, "targetBlank": True}]))
    if column.decimals is not None:
        found.append(models.DynamicConfigValue("decimals", column.decimals))
    if column.width is not None:
        found.append(models.DynamicConfigValue("custom.width", column.width))
    return found


def words(texts: Mapping[int, tuple[str, str]]) -> models.ValueMap:
    """Values that stand for (text, colour)."""
    return models.ValueMap(
        options={
            str(value): models.ValueMappingResult(text=text, color=color, index=i)
            for i, (value, (text, color)) in enumerate(texts.items())
        }
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")


@dataclass
class _Whole:
    panel: models.Panel

    def build(self) -> models.Panel:
        return self.panel


def _built(panel: Any) -> PanelBuilder:
    return _Whole(panel.build())
