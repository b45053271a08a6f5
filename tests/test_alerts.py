"""The alert rules: each fires when it should and not when it should not, and says what to do."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from deploy.cli import app
from feedback.config import reference
from learner.config import LearnerConfig
from serving.metrics import ANSWERS
from tests.prometheus import DEPLOY, made_up, program, sides

CASES = Path(__file__).parent / "alerts_test.yml"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def promtool(*words: str | Path, code: int = 0) -> str:
    """What it says, which ends with this exit code."""
    done = subprocess.run([program("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_its_rules():
    told = promtool("check", "config", DEPLOY / "prometheus.yml")
    assert f"{len(RULES) + 1} rules found" in told, "the alerts, and what is recorded"


def test_each_alert_fires_and_keeps_still_as_its_cases_say():
    assert "SUCCESS" in promtool("test", "rules", CASES)


def test_a_changed_rule_fails_its_cases(tmp_path: Path):
    rules, cases = (path.read_text("utf-8") for path in (DEPLOY / "alerts.yml", CASES))
    for was, now in (("> 0.02", "> 0.2"), ("for: 30m", "for: 0m"), ("heed_swaps_total", "heed_swap_total")):
        assert was in rules
        rules = rules.replace(was, now)
    (tmp_path / "alerts.yml").write_text(rules, "utf-8")
    (tmp_path / "cases.yml").write_text(cases.replace("../deploy/alerts.yml", "alerts.yml"), "utf-8")
    told = promtool("test", "rules", tmp_path / "cases.yml", code=1)
    failed = {name for name in RULES if name in told}
    assert {"HeedErrors", "HeedNoUpdate", "HeedSwapsFail"} <= failed
    assert "HeedOutboxGrows" not in failed


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    seen = defaultdict[str, set[bool]](set)
    for case in yaml.safe_load(CASES.read_text("utf-8"))["tests"]:
        for asked in case["promql_expr_test"]:
            for alert in re.findall(r'^ALERTS{alertname="(\w+)",alertstate="firing"}$', asked["expr"]):
                seen[alert].add(bool(asked.get("exp_samples")))
    assert seen == {name: {True, False} for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str):
    rule = RULES[name]
    said = rule["annotations"]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(said) == {"summary", "description", "runbook", "runbook_url"}
    assert said["runbook_url"] == f"docs/operations.md#{name.lower()}"
    assert sides(rule["expr"]), "it compares nothing"
    assert not made_up(rule["expr"])


@pytest.mark.parametrize("name", RULES)
def test_what_a_runbook_names_exists(name: str):
    runbook = RULES[name]["annotations"]["runbook"]
    settings = {doc.name for doc in reference(LearnerConfig)}
    assert set(re.findall(r"HEED_[A-Z_]+", runbook)) <= settings
    assert set(re.findall(r"\bHeed[A-Z]\w+", runbook)) <= set(RULES)
    for path in re.findall(r"(?:POST |HOST:8000)(/[\w/]+)", runbook):
        assert path in ANSWERS, path
    for words in re.findall(r"`heed ([a-z ]+)", runbook):
        command = typer.main.get_command(app)
        for word in words.split():
            command = command.commands[word]  # type: ignore[attr-defined]
