"""However many versions and users there are, and whatever clients invent: no metric grows another time series."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from feedback.board import open_board
from feedback.config import FeedbackConfig
from learner.board import LearnersBoard
from learner.ledger import Update
from learner.metrics import CHECKS, PHASES, LearnerMetrics
from learner.notices import Notices
from learner.report import feedback_counts
from learner.state import State
from serving.metrics import Metrics
from serving.routes.intake import Intake
from serving.routes.wiring import Client
from serving.schemas import Rating, Thumb
from tests.served import Served, random_adapter
from tests.told import BASE, NOW, POLICY, exchange, feedback, records

VERSIONS, USERS = 200, 10_000
Series = set[tuple[str, tuple[tuple[str, str], ...]]]


def series(registry: CollectorRegistry, without: Iterable[str] = ()) -> Series:
    """Every time series of a scrape, but for those of some metrics."""
    samples = [sample for family in registry.collect() if family.name not in without for sample in family.samples]
    return {(one.name, tuple(sorted(one.labels.items()))) for one in samples}


def test_two_hundred_versions_and_ten_thousand_users_are_no_more_time_series_to_a_server(
    serve_with: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what is kept here need not last
    server = serve_with(vllm_metrics=True)
    store, registry, speaker = server.wiring.store, server.wiring.metrics.registry, server.wiring.speaker
    assert speaker is not None
    before, loaded = series(registry, ["heed_version_info"]), set[int]()
    weights, replies = random_adapter(server.base), list[str]()
    for number in range(VERSIONS):
        store.change("promote", "operator", version=store.publish(weights, parent=0, base=server.base))
        speaker.swapper.look()
        loaded |= speaker.engine.loaded().keys()
        if number % 10 == 0:
            named = f"default@v{max(number - 1, 0)}"
            replies.append(server.chat(user=f"chatter {number}", model=named, max_tokens=1).json()["id"])
            replies.append(server.chat(user=f"other {number}", max_tokens=1).json()["id"])

    async def rate(users: range) -> None:
        intake = Intake(server.wiring)
        said = [
            Thumb(kind="thumb", reply_id=replies[user % len(replies)], value="up", user=f"user {user}")
            if user % 3
            else Rating(kind="rating", reply_id=replies[user % len(replies)], value=4, user=f"user {user}")
            for user in users
        ]
        await asyncio.gather(*(intake.accept(one, Client("", ""), None) for one in said))

    for start in range(0, USERS, 500):
        server.ask(rate(range(start, start + 500)))
    server.until(lambda: not server.wiring.unshown)
    assert loaded == set(range(VERSIONS + 1))
    assert server.metric("heed_swaps_total", outcome="activated") == VERSIONS + 1
    assert (
        sum(server.metric("heed_feedback_total", kind=kind, outcome="accepted") for kind in ("thumb", "rating"))
        == USERS
    )
    assert series(registry, ["heed_version_info"]) == before
    told = {*speaker.engine.loaded(), store.release().last_good}
    assert len(series(registry)) - len(before) == len(told) <= 6  # four slots, the base, and the version before


def test_what_clients_invent_is_no_time_series(serve_with: Callable[..., Served]):
    server = serve_with()
    before = series(server.wiring.metrics.registry)
    http = server.http
    for number in range(5):
        http.get(f"/invented/{number}")
        http.get(f"/v1/feedback/fb-{number}")
        http.get(f"/v1/models/invented-{number}")
        http.get(f"/static/{number}.js")
        http.request(f"INVENTED{number}", "/v1/feedback")
        http.request("PUT", f"/v1/replies/{number}")
        http.request("PUT", f"/{number}")
        http.post("/v1/feedback", json={"kind": f"invented {number}", "reply_id": "x"})
        http.post("/v1/feedback", json={"kind": "rating", "reply_id": "x", "value": 10 + number})
        http.post("/v1/feedback", json={"kind": "signal", "reply_id": "x", "name": f"invented {number}"})
        http.post("/v1/chat/completions", json={"model": f"invented-{number}@v1", "messages": []})
        server.chat(model=f"default@v{number + 1}")
        server.chat(model=f"default-{number}")
    assert server.metric("heed_requests_total", route="other", status="404") == 10
    assert server.metric("heed_feedback_total", kind="unknown", outcome="malformed") == 15
    assert series(server.wiring.metrics.registry) == before


def test_a_status_or_a_route_that_nobody_foresaw_is_told_as_other():
    metrics = Metrics("default")
    before = series(metrics.registry)
    for number in range(5):
        metrics.answered("/v1/feedback", 600 + number, 0.1)
        metrics.answered(f"/invented/{number}", 200, 0.1)
    value = metrics.registry.get_sample_value
    assert value("heed_requests_total", {"route": "other", "status": "other"}) == 10
    assert value("heed_request_seconds_count", {"route": "/v1/feedback"}) == 5
    assert value("heed_request_seconds_count", {"route": "other"}) == 5
    assert series(metrics.registry) == before


def test_ten_thousand_users_and_two_hundred_versions_are_no_more_time_series_to_a_learner(tmp_path: Path):
    metrics = LearnerMetrics()
    with contextlib.closing(State(tmp_path / "state.db", policy=POLICY, base=BASE)) as state:
        metrics.count(feedback_counts(state))
        before = series(metrics.registry)
        served = [exchange(f"r{version}", version=version) for version in range(VERSIONS)]
        state.absorb(records(*served), NOW)
        said = [feedback(f"f{user}", f"r{user % VERSIONS}", user=f"user {user}") for user in range(USERS)]
        state.absorb(records(*said), NOW)
        metrics.count(feedback_counts(state))
        with contextlib.closing(LearnersBoard(open_board(FeedbackConfig(data=tmp_path), "learner"))) as board:
            notices = Notices(board, state, metrics, watchers=())
            for number in range(1, VERSIONS + 1):
                update = of_version(number)
                notices.learned(update)
                notices.ended(update)
    value = metrics.registry.get_sample_value
    assert value("heed_feedback_fates", {"fate": "joined"}) == value("heed_judgements_waiting") == USERS
    assert value("heed_updates_total", {"outcome": "released"}) == VERSIONS
    assert value("heed_gate_checks_total", {"check": "probes", "verdict": "pass"}) == VERSIONS
    assert value("heed_last_update_timestamp_seconds") == NOW + VERSIONS
    assert series(metrics.registry) == before


def of_version(number: int) -> Update:
    """An update that brought this version, with all that a gate may ask and a trainer may say of its time."""
    checks = [{"name": name, "verdict": "pass"} for name in CHECKS]
    report = {"reward": {"auroc": 0.6}, "seconds": dict.fromkeys(PHASES, 1.0)}
    return Update(
        number,
        "released",
        started=NOW,
        finished=NOW + number,
        current=number - 1,
        parent=number - 1,
        offsets={},
        feedback=50,
        version=number,
        why=None,
        report=report,
        gate={"checks": checks},
    )
