"""What people watch Heed by, looked at while it runs: a real Prometheus scrapes a server and a learner, people chat and give
every kind of feedback, two updates end and versions are swapped; then every expression of every dashboard, and both sides of
every alert's comparison, is a finite number."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from deploy.dashboards.opinions import JUDGED, Z, liked, stars
from feedback.config import FeedbackConfig
from feedback.events import KINDS
from serving.model import find_model
from tests.broker import free_ports
from tests.house import ROOT, Folder, House, quick_settings
from tests.prometheus import Prometheus, names, sides, substituted
from tests.test_alerts import RULES
from tests.test_dashboards import BOARDS, expressions
from tests.test_up import first_words


@dataclass
class Watched:
    """A server and a learner, and the Prometheus that watches them."""

    house: House
    prometheus: Prometheus
    http: httpx.Client

    def talk_and_rate(self, exchanges: int, kinds: str) -> None:
        """`heed simulate`."""
        told = ["--url", self.house.url, "--exchanges", str(exchanges), "--kinds", kinds, "--wait", "0", "--noise", "0"]
        command = [sys.executable, "-m", "deploy.cli", "simulate", *told]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    def say_the_rest(self) -> None:
        """The kinds that `heed simulate` has not, on two replies to one prompt."""
        messages = [{"role": "user", "content": "Tell me a joke"}]
        chat = {"model": "default", "messages": messages, "n": 2, "max_tokens": 20, "user": "ann"}
        reply = self.http.post("/v1/chat/completions", json=chat).json()["id"]
        for said in (
            {"kind": "ranking", "reply_ids": [reply, f"{reply}:1"]},
            {"kind": "comment", "reply_id": reply, "text": "not bad"},
            {"kind": "signal", "reply_id": reply, "name": "copied"},
        ):
            assert self.http.post("/v1/feedback", json={**said, "user": "ann"}).status_code == 202

    def until(self, expr: str, least: float) -> None:
        """Until Prometheus has seen that much."""
        self.prometheus.until(lambda: self.prometheus.total(expr) >= least, f"{expr} reaches {least:g}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """After every kind of feedback, two updates and the swaps to what they made."""
    folder = tmp_path_factory.mktemp("watched")
    port, metrics = free_ports(2)
    place = Folder(FeedbackConfig(data=folder / "data"), find_model(None))
    settings = quick_settings(place, port) | {"learner_metrics_port": metrics, "update_min_feedback": 40}
    with contextlib.ExitStack() as stack:
        house = stack.enter_context(contextlib.closing(House(folder / "ends", trains=True, **settings)))
        house.start("server", "learner")
        targets = {"heed-server": f"127.0.0.1:{port}", "heed-learner": f"127.0.0.1:{metrics}"}
        prometheus = stack.enter_context(contextlib.closing(Prometheus(folder / "prometheus", targets)))
        http = stack.enter_context(httpx.Client(base_url=house.url, timeout=60, trust_env=False))
        watched = Watched(house, prometheus, http)
        watched.until("sum(up) + sum(heed_ready)", 3)
        assert first_words(house.url)
        watched.talk_and_rate(64, "thumb,rating,preference,correction")
        watched.say_the_rest()
        watched.until('heed_version_info{version="v1",role="current"}', 1)
        watched.until("heed_freshness_seconds_count", 1)
        watched.talk_and_rate(44, "thumb,rating")
        watched.until('heed_version_info{version="v2",role="current"}', 1)
        assert first_words(house.url)
        watched.talk_and_rate(8, "thumb,rating")
        yield watched


def test_everything_that_is_to_be_seen_is_there(watched: Watched):
    kinds = {labels["kind"] for labels, _ in watched.prometheus.ask('heed_feedback_total{outcome="accepted"} > 0')}
    assert kinds == set(KINDS)
    assert watched.prometheus.total("sum(heed_updates_total)") >= 2
    assert len(asked_for()) > 100
    faults: list[str] = []

    def looked() -> bool:
        faults[:] = [fault for expr in sorted(asked_for()) if (fault := watched.prometheus.fault(expr))]
        return not faults

    with contextlib.suppress(AssertionError):  # what was said last is scraped within seconds
        watched.prometheus.until(looked, "nothing is missing", 10)
    assert not faults, "\n".join(faults)


def test_what_people_think_and_its_interval_are_those_of_the_textbook(watched: Watched):
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    recorded = "sum by (version, value) (sum_over_time(version:heed_feedback_value:increase1m[10m]))"
    for labels, value in watched.prometheus.ask(recorded):
        counts[labels["version"]][labels["value"]] = round(value)
    assert counts.keys() == {"v0", "v1", "v2"}
    shown = {side: (by_version(watched, liked(side)), by_version(watched, stars(side))) for side in (-1, 0, 1)}
    for version, said in counts.items():
        n, share = said.total(), sum(said[value] for value in ("up", "4", "5")) / said.total()
        centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
        given = [star for star in range(1, 6) for _ in range(said[str(star)])]
        mean, error = statistics.mean(given), statistics.pstdev(given) / math.sqrt(len(given))
        expected = {-1: (centre - half, mean - Z * error), 0: (share, mean), 1: (centre + half, mean + Z * error)}
        for side, values in expected.items():
            assert [one[version] for one in shown[side]] == pytest.approx(values, abs=1e-4)


def test_what_was_said_of_a_version_is_what_it_is_said_to_be(watched: Watched):
    """Against the learner's own count of the same feedback. What came in the moment of the swap, or of an evaluation that a busy
    Prometheus left out, is missing; of another version's feedback there is none."""
    counted, recorded = watched.http.get("/v1/policy").json()["liked"]["v0"], by_version(watched, JUDGED)["v0"]
    missing = counted["count"] - recorded
    assert 0 <= missing <= 0.25 * counted["count"]
    assert counted["share"] == pytest.approx(by_version(watched, liked())["v0"], abs=missing / recorded + 1e-4)


def test_a_mistyped_name_is_found_wherever_it_is(watched: Watched):
    found = [(expr, name) for expr in asked_for() for name in names(expr)]
    assert len(found) > 80
    for expr, name in found:
        assert "no series" in (watched.prometheus.fault(re.sub(rf"\b{name}\b", f"{name}s", expr)) or "nothing"), expr


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ('heed_feedback_fates{fate="joind"}', "no series"),
        ("sum(rate(heed_requests_total[1m])", "parse error"),
        ('sum(heed_ready) / sum(heed_version_requests_total{role="candidate"})', "is inf"),
    ],
)
def test_other_mistakes_are_found_too(watched: Watched, typed: str, why: str):
    assert why in (watched.prometheus.fault(typed) or "nothing")


def asked_for() -> set[str]:
    """Every expression of every dashboard, as Grafana sends it, and both sides of every alert's comparison."""
    shown = {expr for board in BOARDS.values() for expr in expressions(board)}
    return shown | {side for rule in RULES.values() for side in sides(rule["expr"])}


def by_version(watched: Watched, expr: str) -> dict[str, float]:
    return {labels["version"]: value for labels, value in watched.prometheus.ask(substituted(expr))}
