"""A real Prometheus for the tests, with deploy's own configuration but for addresses and intervals; and what is wrong with an
expression that it is asked."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml

from deploy.welcome import free_port

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
START_S = 120.0
"""Generous: a busy machine imports torch slowly."""
COMPARISONS = (">", "<", "==", "!=")
AS_GRAFANA = {"$__rate_interval": "1m", "$__interval": "5s", "$__range": "10m", "$window": "10m", "$policy": "default"}
"""What Grafana puts in the place of its variables, for a run of a minute."""


def program(name: str) -> str:
    """Where `prometheus` or `promtool` is; skips the test where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return found


class Prometheus:
    """One process, scraping each second; all it keeps is in `folder`."""

    def __init__(self, folder: Path, targets: Mapping[str, str]) -> None:
        """`targets`: job → host:port. Starts it, and returns once it answers."""
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [rules] = config["rule_files"]
        quick = (
            (DEPLOY / rules)
            .read_text("utf-8")
            .replace("interval: 1m", "interval: 1s")
            .replace("offset 1m", "offset 1s")
        )
        assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        folder.mkdir()
        (folder / rules).write_text(quick, "utf-8")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.said = folder / "said.txt"
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.http = httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30)
        self.until(self._answers, "Prometheus answers")

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait()

    def until(self, true: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        give_up = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < give_up, f"not within {seconds:g} s: {what}"
            time.sleep(0.2)

    def ask(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that this is now. Raises ValueError where it cannot be evaluated."""
        answer = self.http.post("/api/v1/query", data={"query": expr}).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        result: Any = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [({}, float(result[1]))]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def total(self, expr: str) -> float:
        """Of all series; 0 where there is none."""
        return sum(value for _, value in self.ask(expr))

    def fault(self, expr: str) -> str | None:
        """Why a reader would see nothing, or no number, there; None where every series has a finite one."""
        try:
            series = self.ask(expr)
        except ValueError as error:
            return f"{expr}\n  {error}"
        if not series:
            return f"{expr}\n  no series"
        odd = [f"{labels} is {value}" for labels, value in series if not math.isfinite(value)]
        return f"{expr}\n  {'; '.join(odd)}" if odd else None

    def _answers(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def substituted(expr: str) -> str:
    """An expression of a dashboard, as Grafana sends it."""
    for name, value in AS_GRAFANA.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"Grafana has no such variable: {re.findall(r'[$][{]?[a-z_]+', expr)}"
    return expr


def nodes(expr: str) -> Iterator[promql_parser.Expr]:
    """Every part of an expression, the whole first."""
    found: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(expr), found.append)
    yield from found


def sides(expr: str) -> list[str]:
    """What every comparison of an expression compares."""
    compared = [node for node in nodes(expr) if isinstance(node, promql_parser.BinaryExpr) and is_comparison(node)]
    return [side.prettify() for node in compared for side in (node.lhs, node.rhs)]


def is_comparison(node: promql_parser.BinaryExpr) -> bool:
    sign = str(node).removeprefix(str(node.lhs)).removesuffix(str(node.rhs))
    return sign.strip().startswith(COMPARISONS)


def made_up(expr: str) -> bool:
    """Whether an expression gives a number of its own where there is none: `or vector(0)`."""
    calls = [node.func.name for node in nodes(expr) if isinstance(node, promql_parser.Call)]
    return "vector" in calls
