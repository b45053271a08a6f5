"""The dashboards: what is committed is what the code writes, and a reader can make sense of every panel."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from promql_parser import VectorSelector

from deploy.dashboards.__main__ import GRAFANA, texts
from tests.prometheus import DEPLOY, made_up, nodes, substituted

Json = dict[str, Any]
BOARDS: dict[str, Json] = {name: json.loads(text) for name, text in texts().items()}
UNITS = {"none", "short", "s", "reqps", "percentunit"}


def panels(board: Json) -> list[Json]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: Json) -> Iterator[str]:
    """As Grafana sends them: of every panel, and of the marks on them."""
    for panel in panels(board):
        yield from (substituted(target["expr"]) for target in panel["targets"])
    yield from (substituted(one["expr"]) for one in board["annotations"]["list"])


@pytest.mark.parametrize("name", BOARDS)
def test_the_committed_dashboard_is_what_the_code_writes(name: str):
    assert (GRAFANA / name).read_text("utf-8") == texts()[name], "write it again: python -m deploy.dashboards"


def test_there_are_no_other_dashboards():
    assert {path.name for path in GRAFANA.glob("*.json")} == set(BOARDS)


def test_a_link_to_a_dashboard_stays_right():
    assert {board["uid"] for board in BOARDS.values()} == {"heed-serving", "heed-learning", "heed-release"}
    for board in BOARDS.values():
        ids = [panel["id"] for panel in board["panels"]]
        assert ids == list(range(1, len(ids) + 1))
        assert "id" not in board or board["id"] is None, "Grafana numbers dashboards itself"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_within_the_grid_and_not_on_each_other(name: str):
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["x"] + place["w"] <= 24
        cells = itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
        for cell in cells:
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_a_panel_says_what_is_good_and_what_is_bad_in_its_unit(name: str):
    for panel in panels(BOARDS[name]):
        assert re.fullmatch(r".+\n\n\*\*Good:\*\* .+\n\n\*\*Bad:\*\* .+", panel["description"]), panel["title"]
        if panel["type"] == "state-timeline":
            continue  # its values are names
        fields = panel["fieldConfig"]
        overrides = [one for override in fields["overrides"] for one in override["properties"] if one["id"] == "unit"]
        units = {fields["defaults"].get("unit"), *(one["value"] for one in overrides)} - {None}
        assert units, panel["title"]
        assert units <= UNITS


def test_the_first_panel_of_learning_is_what_people_think_and_versions_are_marked():
    first, *_ = panels(BOARDS["learning.json"])
    known, *opinions = (target["expr"] for target in first["targets"])
    assert known.startswith("max by (version, role) (heed_version_info")
    assert len(opinions) == 8
    assert all("version:heed_feedback_value:increase1m" in expr for expr in opinions)
    for board in BOARDS.values():
        [marks] = board["annotations"]["list"]
        assert 'heed_version_info{policy="$policy",role="current"}' in marks["expr"]
        assert marks["titleFormat"] == "{{version}} speaks"


@pytest.mark.parametrize("name", BOARDS)
def test_no_expression_makes_a_number_up_or_asks_for_another_job_or_instance(name: str):
    for expr in expressions(BOARDS[name]):
        assert not made_up(expr), expr
        selected = [node for node in nodes(expr) if isinstance(node, VectorSelector)]
        matchers = [matcher for one in selected for matcher in one.matchers.matchers]
        named = {matcher.value for matcher in matchers if matcher.name in ("job", "instance")}
        assert named <= {"heed-server", "heed-learner"}


def test_grafana_is_provisioned_with_prometheus_as_it_scrapes():
    [source] = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
    assert source["isDefault"] is True
    variables = {one["name"]: one for one in BOARDS["learning.json"]["templating"]["list"]}
    assert variables["datasource"]["query"] == source["type"] == "prometheus"
