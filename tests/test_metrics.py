"""What the server counts: the names that dashboards use, label sets that are there from the start, and true numbers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families

from feedback.events import KINDS, Release
from serving.metrics import ANSWERS, Metrics, Now, role_of
from serving.routes import admin, chat, feedback, operations, policy
from tests.served import Served

NAMES = {
    "heed_requests": {"route", "status"},
    "heed_request_seconds": {"route"},
    "heed_time_to_first_token_seconds": set[str](),
    "heed_inter_token_seconds": set[str](),
    "heed_queue_seconds": set[str](),
    "heed_tokens": {"kind"},
    "heed_running_requests": set[str](),
    "heed_waiting_requests": set[str](),
    "heed_rows_limit": set[str](),
    "heed_slots": {"state"},
    "heed_kv_usage_ratio": set[str](),
    "heed_prefix_tokens": {"hit"},
    "heed_outbox_events": set[str](),
    "heed_replies": {"reason"},
    "heed_version_info": {"policy", "version", "role"},
    "heed_version_requests": {"policy", "role"},
    "heed_swap_seconds": {"phase"},
    "heed_swaps": {"outcome"},
    "heed_feedback": {"kind", "outcome"},
    "heed_feedback_value": {"policy", "kind", "value", "role"},
    "heed_exchanges": {"outcome"},
    "heed_ready": set[str](),
}


@pytest.mark.parametrize(
    ("version", "role"), [(0, "base"), (5, "current"), (6, "candidate"), (4, "previous"), (3, "older"), (9, "older")]
)
def test_a_version_has_one_role(version: int, role: str):
    assert role_of(version, Release(current=5, candidate=6, last_good=4)) == role


def test_the_base_is_the_base_even_when_it_is_current():
    assert role_of(0, Release(current=0, last_good=0)) == "base"


def test_every_known_label_set_is_there_before_anything_happened():
    metrics = Metrics("default")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]

    def labels(name: str) -> list[dict[str, str]]:
        return [sample.labels for sample in samples if sample.name == name]

    assert {one["kind"] for one in labels("heed_feedback_total")} == {*KINDS, "unknown"}
    assert {one["role"] for one in labels("heed_version_requests_total")} == {
        "current", "candidate", "previous", "older", "base"
    }  # fmt: skip
    assert {(one["kind"], one["value"]) for one in labels("heed_feedback_value_total")} == {
        ("thumb", "up"), ("thumb", "down"), *(("rating", str(stars)) for stars in range(1, 6))
    }  # fmt: skip
    assert {one["phase"] for one in labels("heed_swap_seconds_count")} == {"load", "stage", "warm", "flip", "drain"}
    assert {one["reason"] for one in labels("heed_replies_total")} == {"stop", "length", "abort", "error"}
    answers = {(one["route"], one["status"]) for one in labels("heed_requests_total")}
    assert {("/v1/feedback", "202"), ("/v1/feedback", "500"), ("/ready", "503"), ("/metrics", "200")} <= answers
    assert {route for route, _ in answers} == {one["route"] for one in labels("heed_request_seconds_count")}
    assert all(sample.value == 0 for sample in samples if not sample.name.endswith("_created"))


def test_every_route_has_its_answers_and_is_counted_by_its_own_name(serve_with: Callable[..., Served]):
    routers = [module.router for module in (admin, chat, feedback, operations, policy)]
    routes = {route.path for router in routers for route in router.routes if isinstance(route, APIRoute)}
    assert routes | {feedback.GIVE, "/static", "other"} == set(ANSWERS)
    server = serve_with(speaks=False)
    for route in ANSWERS.keys() - {"other"}:
        server.http.put("/static/chat.js" if route == "/static" else route)
        server.until(lambda route=route: server.metric("heed_requests_total", route=route, status="405") == 1)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("heed_swap_seconds", 0.0001, 300),
        ("heed_time_to_first_token_seconds", 0.005, 120),
        ("heed_request_seconds", 0.005, 300),
        ("heed_inter_token_seconds", 0.001, 10),
    ],
)
def test_buckets_reach_from_the_shortest_to_the_longest_that_is_to_be_told_apart(name: str, low: float, high: float):
    bounds = [
        float(sample.labels["le"])
        for family in Metrics("default").registry.collect()
        for sample in family.samples
        if sample.name == f"{name}_bucket"
    ]
    assert min(bounds) <= low
    assert max(bound for bound in bounds if bound < math.inf) >= high


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics("default"), Metrics("default")
    one.swaps.labels("activated").inc()
    assert other.swaps.labels("activated")._value.get() == 0


def test_what_is_running_is_looked_at_when_it_is_asked_for():
    metrics, running = Metrics("default"), [3]
    metrics.watch(
        lambda: Now(
            ready=True,
            running=running[0],
            waiting=1,
            prompt_tokens=30,
            prefix_tokens=20,
            kv_usage=0.25,
            loaded={0: "base", 2: "current"},
            previous=1,
            rows=32,
            slots=4,
            free_slots=3,
        )
    )
    assert metrics.registry.get_sample_value("heed_rows_limit") == 32
    assert metrics.registry.get_sample_value("heed_slots", {"state": "used"}) == 1
    assert metrics.registry.get_sample_value("heed_slots", {"state": "free"}) == 3
    assert metrics.registry.get_sample_value("heed_running_requests") == 3
    running[0] = 5
    assert metrics.registry.get_sample_value("heed_running_requests") == 5
    for version, role, loaded in (("v2", "current", 1), ("v1", "previous", 0), ("v0", "base", 1)):
        labels = {"policy": "default", "version": version, "role": role}
        assert metrics.registry.get_sample_value("heed_version_info", labels) == loaded


def test_a_scrape_shows_every_name_and_true_numbers(server: Served):
    server.publish()
    body = server.chat(n=2, max_tokens=5, heed={"ignore_eos": True}).json()
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "default@v0",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": 7,
            "heed": {"ignore_eos": True},
        },
    ) as answer:
        list(answer.iter_lines())
    server.chat(store=False)
    server.http.post("/v1/feedback", json={"kind": "thumb", "reply_id": body["id"], "value": "up"})
    server.http.post("/v1/feedback", json={"kind": "thumb", "reply_id": "chatcmpl-x", "value": "up"})
    server.http.get("/no/such/route")
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    families = {
        name: family for name, family in families.items() if not name.endswith("_created")
    }  # a server shows none
    assert set(NAMES) == set(families)
    for name, labels in NAMES.items():
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels, name

    assert server.metric("heed_requests_total", route="/v1/chat/completions", status="200") == 3
    assert server.metric("heed_requests_total", route="/v1/feedback", status="404") == 1
    assert server.metric("heed_requests_total", route="other", status="404") == 1
    assert server.metric("heed_request_seconds_count", route="/v1/chat/completions") == 3
    assert server.metric("heed_tokens_total", kind="reply") >= 2 * 5 + 7
    assert server.metric("heed_time_to_first_token_seconds_count") == 1
    assert server.metric("heed_inter_token_seconds_count") == 6
    assert server.metric("heed_queue_seconds_count") == 4
    assert server.metric("heed_exchanges_total", outcome="kept") == 3
    assert server.metric("heed_exchanges_total", outcome="not_stored") == 1
    assert server.metric("heed_version_requests_total", policy="default", role="current") == 2
    assert server.metric("heed_version_requests_total", policy="default", role="base") == 1
    assert server.metric("heed_feedback_total", kind="thumb", outcome="accepted") == 1
    assert server.metric("heed_feedback_total", kind="thumb", outcome="unknown_reply") == 1
    assert server.metric("heed_version_info", policy="default", version="v1", role="current") == 1
    assert server.metric("heed_swaps_total", outcome="activated") == 2
    assert server.metric("heed_swap_seconds_count", phase="flip") == 2
    assert server.metric("heed_replies_total", reason="length") == 4
    assert server.metric("heed_rows_limit") == 4
    assert (server.metric("heed_slots", state="used"), server.metric("heed_slots", state="free")) == (1, 3)


def test_running_and_waiting_are_those_of_the_engine(serve_with: Callable[..., Served]):
    server = serve_with(max_rows=2)
    seen: list[tuple[float, float, float]] = []
    talking = threading.Thread(target=lambda: server.chat(n=6, max_tokens=150, heed={"ignore_eos": True}))
    talking.start()
    while talking.is_alive():
        seen.append(
            (
                server.metric("heed_running_requests"),
                server.metric("heed_waiting_requests"),
                server.metric("heed_kv_usage_ratio"),
            )
        )
        time.sleep(0.02)  # the server runs in this very process: asked without a pause, it would do nothing else
    assert max(running for running, _, _ in seen) == 2
    assert max(waiting for _, waiting, _ in seen) >= 1
    assert 0 < max(usage for _, _, usage in seen) <= 1
    assert server.metric("heed_running_requests") == 0
