"""Panels in one short call each, and a dashboard of rows of them: thin over Grafana's own builders.

Every panel has a title and says `what` it shows, and what is `good` and what is `bad` there. Units are Grafana's: `s`, `reqps`
(requests a second), `percentunit` (a share of 1), `short` (a count), `none`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    CustomVariable,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import AnnotationQuery as Annotation
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.dashboard import DynamicConfigValue as Property
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel = timeseries.Panel | stat.Panel | table.Panel | statetimeline.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, table.Panel, statetimeline.Panel)

RATE = "$__rate_interval"
WINDOW = "$window"
"""The reader's choice, for what comes too seldom for a rate: opinions, updates, swaps."""
WINDOWS = ("1h", "6h", "1d", "7d")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
COLOURS = {"current": "blue", "previous": "orange", "base": "#8e8e8e"}
"""Told apart by those who see no red and green, too."""
VERSIONS = 'max by (version) (heed_version_info{policy="$policy",role="current"})'


class Query(NamedTuple):
    """An expression, and how its lines are called: Grafana fills in {{label}}."""

    expr: str
    name: str


def rate(metric: str, by: str = "", per: str = RATE) -> str:
    """Events a second, added up over servers."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}[{per}]))"


def seen(metric: str, by: str = "", per: str = WINDOW) -> str:
    """Events within a window, added up over servers."""
    return f"sum{f' by ({by}) ' if by else ''}(increase({metric}[{per}]))"


def share(part: str, whole: str) -> str:
    """No line where there is nothing to have a share of."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, metric: str, by: str = "", per: str = RATE) -> str:
    """Of a histogram over all servers; no line where nothing was observed. `metric` may have a selector."""
    name, brace, selector = metric.partition("{")
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, sum by ({labels}) (rate({name}_bucket{brace}{selector}[{per}]))) >= 0"


def quantiles(metric: str, per: str = RATE) -> list[Query]:
    """The middle, and the slow end."""
    return [Query(quantile(q, metric, per=per), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)]


def lines(
    title: str,
    what: str,
    good: str,
    bad: str,
    unit: str,
    queries: Sequence[Query],
    *,
    width: int = 8,
    bars: bool = False,
    top: float | None = None,
) -> timeseries.Panel:
    """Values over time. `bars` are stacked, for counts; `top`: where the axis ends at least (1 for shares)."""
    panel = _panel(timeseries.Panel(), title, _said(what, good, bad), queries, width).unit(unit)
    panel.axis_soft_min(0).span_nulls(False).fill_opacity(8).line_width(2)
    panel.legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    if top is not None:
        panel.axis_soft_max(top)
    if bars:
        panel.draw_style(GraphDrawStyle.BARS).fill_opacity(70).line_width(0)
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return panel


def banded(
    title: str, what: str, good: str, bad: str, unit: str, queries: Sequence[Query], *, bottom: float, top: float
) -> timeseries.Panel:
    """A line for each role, within its band: `queries` are called by the role, and by the role with "low" and "high"."""
    panel = lines(title, what, good, bad, unit, queries, width=12, top=top).axis_soft_min(bottom).max_data_points(100)
    unnamed = {"legend": True, "tooltip": False, "viz": False}
    bounds = [Property("custom.lineWidth", 0), Property("custom.hideFrom", unnamed)]
    panel.override_by_regexp("/ (low|high)$/", bounds)
    for role, colour in COLOURS.items():
        panel.override_by_regexp(f"/^{role}/", [Property("color", {"mode": "fixed", "fixedColor": colour})])
        panel.override_by_name(f"{role} high", [Property("custom.fillBelowTo", f"{role} low")])
    return panel


def number(
    title: str, what: str, good: str, bad: str, unit: str, queries: Sequence[Query], *, width: int = 4, height: int = 4
) -> stat.Panel:
    """What is so now, in large figures."""
    return _panel(stat.Panel(), title, _said(what, good, bad), queries, width, height).unit(unit)


def rows(
    title: str, what: str, good: str, bad: str, columns: Sequence[Query], *, by: str, units: Mapping[str, str]
) -> table.Panel:
    """A table of what is so now: a row for each value of the label `by`, a column for each query and each other label.

    A query without a name has no column of its own.
    """
    panel = _panel(table.Panel(), title, _said(what, good, bad), (), 24, 6)
    names = {f"Value #{_ref(place)}": query.name for place, query in enumerate(columns)}
    for place, query in enumerate(columns):
        panel.with_target(_target(query, place).instant().format(PromQueryFormat.TABLE))
    order = {by: 0, **{value: 1 + place for place, value in enumerate(names)}}
    hidden = {"Time": True, **{value: True for value, name in names.items() if not name}}
    organize = {"excludeByName": hidden, "renameByName": names, "indexByName": order}
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(DataTransformerConfig(id_val="organize", options=organize))
    for name, unit in units.items():
        panel.override_by_name(name, [Property("unit", unit), Property("decimals", 2)])
    return panel


def reigns(title: str, what: str, good: str, bad: str, query: Query, *, width: int = 24) -> statetimeline.Panel:
    """A bar for each thing that is so, from when to when."""
    panel = _panel(statetimeline.Panel(), title, _said(what, good, bad), [query], width, 6)
    return panel.legend(common.VizLegendOptions().show_legend(False)).show_value(VisibilityMode.NEVER)


def board(
    uid: str, title: str, description: str, sections: Mapping[str, Sequence[Panel]], *, refresh: str
) -> Dashboard:
    """A dashboard of titled rows, with the versions that spoke marked on every panel over time."""
    made = Dashboard(title).uid(uid).description(description).tags(["heed"]).editable()
    made.time("now-6h", "now").refresh(refresh).timezone("browser")
    made.link(
        DashboardLink("Heed").type(DashboardLinkType.DASHBOARDS).tags(["heed"]).keep_time(True).include_vars(True)
    )
    made.with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    made.with_variable(
        QueryVariable("policy")
        .label("Policy")
        .datasource(SOURCE)
        .query("label_values(heed_version_requests_total, policy)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    made.with_variable(
        CustomVariable("window")
        .label("Window")
        .values(",".join(WINDOWS))
        .current(VariableOption(selected=True, text="6h", value="6h"))
    )
    made.annotation(_MarkedVersions())
    number = 0
    for heading, panels in sections.items():
        number += 1
        made.with_row(Row(heading).id(number))
        for panel in panels:
            number += 1
            made.with_panel(panel.id(number))
    return made


class _Marks(Annotation):
    """An annotation of Prometheus' kind, which has a title and a step beside what all kinds have."""

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "titleFormat": "{{version}} speaks", "step": "15s"}


class _MarkedVersions(Builder[Annotation]):
    def build(self) -> Annotation:
        return _Marks(name="Versions", datasource=SOURCE, enable=True, icon_color="purple", expr=VERSIONS)


def _said(what: str, good: str, bad: str) -> str:
    return f"{what}\n\n**Good:** {good}\n\n**Bad:** {bad}"


def _panel(panel: P, title: str, said: str, queries: Sequence[Query], width: int, height: int = 8) -> P:
    panel.title(title).description(said).datasource(SOURCE).span(width).height(height)
    for place, query in enumerate(queries):
        panel.with_target(_target(query, place))
    return panel


def _target(query: Query, place: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.name).ref_id(_ref(place)).datasource(SOURCE)


def _ref(place: int) -> str:
    return chr(ord("A") + place)
