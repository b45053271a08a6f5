"""What docs/ say there is, there is, and what there is they say: settings, metrics, verbs, routes, errors, alerts, functions."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from docs.source_pages import line_of
from feedback.config import UNBUILT, reference, variable
from learner.config import LearnerConfig
from serving import errors
from serving.routes import admin, chat, feedback, operations, policy
from serving.schemas import ChatIn, HeedIn
from tests.documents import EVERYTHING, PAGES, ROOT, blocks, inline
from tests.reference import DOCS, MADE, MARKS, each_command, flags, registries
from tests.served import Served

CHAT, OPERATIONS = PAGES["docs/chat.md"], PAGES["docs/operations.md"]
OTHERS = {"HEED_SOAK"}
"""Variables that are no settings."""


@pytest.mark.parametrize("page", MADE)
def test_tables_are_complete_and_true(page: str):
    found = MARKS.search((DOCS / page).read_text("utf-8"))
    assert found, f"docs/{page} has lost the marks around what is written from the code"
    assert found["made"] == MADE[page](), "write it again: PYTHONPATH=. python tests/test_docs.py"


def test_settings_that_are_named_exist():
    known = {doc.name for doc in reference(LearnerConfig)} | {variable(key) for key in UNBUILT} | OTHERS
    assert set(re.findall(r"\bHEED_[A-Z][A-Z_]*[A-Z]\b", EVERYTHING)) <= known


def test_keys_of_heed_toml_that_are_shown_exist():
    shown = re.findall(r"^(\w+) = ", PAGES["docs/settings.md"], re.MULTILINE)
    assert shown
    assert set(shown) <= {doc.key for doc in reference(LearnerConfig)}


def test_metrics_that_are_named_exist():
    families = [family for registry in registries().values() for family in registry.collect()]
    known = {family.name + end for family in families for end in ("", "_total", "_bucket", "_sum", "_count")}
    named = set(re.findall(r"(?<![\w./-])heed_[a-z_]+\b", EVERYTHING))
    assert len(named) > len(families) / 2
    assert named <= known


def test_flags_that_are_named_alone_exist():
    known = {flag for _, command in each_command() for flag in flags(command)} | {"--help"}
    assert {words for words in inline(EVERYTHING) if re.fullmatch(r"--[a-z-]+", words)} <= known


def test_routes_are_those_of_the_server():
    routers = (chat.router, feedback.router, policy.router, operations.router, admin.router)
    there = {f"{method} {route.path}" for router in routers for route in router.routes for method in route.methods}
    told = re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)` \|", CHAT, re.MULTILINE)
    assert {re.sub(r":\w+}", "}", one) for one in there} | {f"POST {feedback.GIVE}"} == set(told)
    named = re.findall(r"`(?:(GET|POST|DELETE) )(/[\w/{}]+)`", EVERYTHING)
    assert {" ".join(one) for one in named} <= set(told)


def test_parameters_are_all_told_and_an_error_looks_as_shown(server: Served):
    taken = {*ChatIn.model_fields, *(f"heed.{name}" for name in HeedIn.model_fields)} - {"heed", "stream_options"}
    refused = {name for name, field in ChatIn.model_fields.items() if field.annotation is Any}
    assert taken - refused <= set(inline(CHAT))
    [shown] = [block for block in blocks(CHAT, "json") if block.startswith('{"error"')]
    body = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "temperature": 3}
    assert server.http.post("/v1/chat/completions", json=body).json() == json.loads(shown)


def test_codes_of_errors_are_those_of_the_server():
    said = "\n".join(path.read_text("utf-8") for path in (ROOT / "serving").rglob("*.py"))
    there = set(re.findall(r'\bcode ?= ?"(\w+)"', said)) | set(re.findall(r'", "(\w+_\w+)"$', said, re.MULTILINE))
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", CHAT, re.MULTILINE)
    told = {(int(status), code) for status, codes in rows for code in re.findall(r"\w+", codes)}
    assert {code for _, code in told} == there - {"n"}
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.HeedError)]
    assert {(kind.status, kind.code) for kind in kinds if kind.code} <= told


def test_each_alert_is_explained_under_its_name():
    rules = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "alerts.yml").read_text("utf-8"))
    told = OPERATIONS.partition("## Alerts\n")[2].split("\n### ")[1:]
    assert [part.partition("\n")[0] for part in told] == rules
    for part in told:
        assert all(f"\n**{heading}**" in part for heading in ("It means", "Look at", "Do")), part


def test_what_heed_check_looks_at_is_told_by_name():
    said = "\n".join(path.read_text("utf-8") for path in (ROOT / "deploy").glob("check*.py"))
    there = set(re.findall(r'(?:Finding|_folder)\(\s*"(\w+)"', said))
    table = OPERATIONS.partition("| name | is well when |\n")[2].partition("\n\n")[0]
    assert set(inline(table)) - {"HEED_*"} == there


def test_panels_that_are_named_are_on_a_dashboard():
    boards = [path.read_text("utf-8") for path in (ROOT / "deploy" / "grafana").glob("*.json")]
    there = {title for board in boards for title in re.findall(r'^ +"title": "(.+)",?$', board, re.MULTILINE)}
    guide = PAGES["docs/learning.md"].partition("## The dashboards\n")[2].partition("\n## ")[0]
    named = re.findall(r'"([A-Z][^"]+)"', guide + OPERATIONS.partition("## Alerts\n")[2])
    assert len(named) > 15
    assert set(named) <= there


def test_functions_that_formulas_lead_to_exist():
    told = re.findall(r"\[`([\w/]+\.py)::([\w.]+)`\]\(([^)]+)\)", EVERYTHING)
    assert len(told) > 30
    for path, name, target in told:
        assert target == f"../{path}"
        assert line_of(path, name) > 1
