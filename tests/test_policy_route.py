"""What is served and why, in one answer; and single replies as they were kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from feedback.board import open_board
from feedback.config import FeedbackConfig
from feedback.events import Exchange
from tests.served import Served


def test_with_nothing_learned_the_base_is_served_and_a_sentence_says_why(server: Served):
    told = server.http.get("/v1/policy").json()
    assert (told["policy"], told["base"]) == ("default", "random-llama")
    assert (told["current"], told["candidate"], told["share"], told["paused"]) == ("v0", None, 0.0, False)
    assert (told["speaking"], told["loaded"]) == ("v0", ["v0"])
    assert told["last_update"] is None
    assert told["freshness"] == {"p50": None, "p95": None, "count": 0}
    assert "no learner has been seen" in told["why"]
    assert told["problem"] is None


def test_what_the_learner_reports_is_part_of_it(server: Served, tmp_path: Path):
    learner = open_board(FeedbackConfig(data=tmp_path / "data"), "learner")
    report = {"why": "7 of the 50 new judgements that start an update", "gate": {"passed": False}, "seen_at": 1.0}
    server.ask(learner.set_report("policy", json.dumps(report | {"current": "a lie"})))
    told = server.http.get("/v1/policy").json()
    server.ask(learner.close())
    assert (told["why"], told["gate"], told["seen_at"]) == (report["why"], {"passed": False}, 1.0)
    assert told["current"] == "v0"  # the release is read, never taken from hearsay
    assert told["liked"] == {}


def test_a_promoted_version_is_current_loaded_and_noted_as_served(server: Served):
    before = time.time()
    version = server.publish()
    server.until(lambda: f"v{version}" in server.http.get("/v1/policy").json()["activated"])
    told = server.http.get("/v1/policy").json()
    assert (told["current"], told["speaking"], told["last_good"]) == (f"v{version}", f"v{version}", "v0")
    assert told["loaded"] == ["v0", f"v{version}"]
    assert before <= told["activated"][f"v{version}"] <= time.time()


def test_a_version_that_cannot_be_served_is_a_problem_that_is_told(server: Served):
    good = server.publish(1)
    bad = server.publish(2, promote=False)
    store = server.wiring.store
    store.change("promote", "operator", version=bad)
    (store.folder / f"v{bad:06d}" / "adapter_model.safetensors").write_bytes(b"torn")
    server.publish(3)
    store.change("rollback", "operator")
    server.until(lambda: server.http.get("/v1/policy").json()["problem"] is not None)
    told = server.http.get("/v1/policy").json()
    assert told["current"] == f"v{bad}"
    assert told["speaking"] in (f"v{bad + 1}", f"v{good}")
    assert "digest" in told["problem"]
    assert server.chat().status_code == 200
    assert server.metric("heed_swaps_total", outcome="failed") >= 1


def test_a_broken_release_file_stops_nothing(serve_with: Callable[..., Served]):
    server = serve_with()
    release = server.wiring.store.folder / "release.json"
    release.parent.mkdir(parents=True, exist_ok=True)
    release.write_text("{torn")
    assert server.chat().status_code == 200
    assert "release.json" in server.http.get("/v1/policy").json()["problem"]
    assert server.http.get("/metrics").status_code == 200


def test_policy_is_answered_while_the_model_is_loading(serve_with: Callable[..., Served]):
    told = serve_with(speaks=False).http.get("/v1/policy").json()
    assert (told["current"], told["speaking"], told["loaded"]) == ("v0", None, [])


def test_a_reply_is_read_as_it_was_kept(server: Served):
    body = server.chat(n=2, user="ann").json()
    for name in (body["id"], f"{body['id']}:1"):
        answer = server.http.get(f"/v1/replies/{name}")
        assert answer.headers["content-type"] == "application/json"
        [kept] = [one for one in server.exchanges() if one.id == name]
        assert Exchange.model_validate_json(answer.text) == kept


def test_replies_that_are_none_not_ours_or_forgotten_are_404(server: Served):
    forgotten = server.wiring.ids.new_reply("", kept=True)
    for name, code in [("chatcmpl-x", "unknown_reply"), (forgotten, "reply_forgotten")]:
        answer = server.http.get(f"/v1/replies/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
