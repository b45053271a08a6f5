"""Feedback over HTTP: kept once before it is acknowledged, idempotent, retractable, with its story."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from feedback.board import Story
from feedback.config import FeedbackConfig
from feedback.events import FEEDBACK, Feedback, Retraction
from serving.ids import Ids, load_secret
from tests.served import Served, TroubledLog


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def give(server: Served, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return server.http.post("/v1/feedback", json=body, headers=headers)


@pytest.fixture
def quiet(serve_with: Callable[..., Served]) -> Served:
    """A server without a model: feedback needs none."""
    return serve_with(speaks=False)


def reply(server: Served, choices: int = 1, *, kept: bool = True) -> str:
    """The id of a reply that was given by a server with this secret, and that the board knows nothing of."""
    return server.wiring.ids.new_reply("", kept=kept, choices=choices)


def test_a_thumb_is_in_the_log_when_it_is_acknowledged(server: Served):
    body = server.chat(user="ann").json()
    answer = give(server, kind="thumb", reply_id=body["id"], value="up", user="ann", metadata={"page": "home"})
    assert answer.status_code == 202
    receipt = answer.json()
    assert receipt == {"id": receipt["id"], "status": "accepted"}
    [said] = server.said()
    assert isinstance(said, Feedback)
    assert (said.id, said.kind, said.value, said.aspect) == (receipt["id"], "thumb", 1.0, "overall")
    assert said.reply_ids == (body["id"],)
    assert (said.content.user, said.content.metadata) == ("ann", {"page": "home"})
    [record] = server.wiring.log.read(FEEDBACK, {}, 10)
    assert record.key == server.exchanges()[0].id


def test_every_kind_becomes_its_event(quiet: Served):
    one, two = reply(quiet, 2), reply(quiet)
    bodies: list[dict[str, Any]] = [
        {"kind": "thumb", "reply_id": one, "value": "down", "aspect": "safety"},
        {"kind": "rating", "reply_id": f"{one}:1", "value": 4},
        {"kind": "preference", "chosen": f"{one}:1", "rejected": one},
        {"kind": "ranking", "reply_ids": [two, one, f"{one}:1"]},
        {"kind": "correction", "reply_id": two, "text": "better so"},
        {"kind": "comment", "reply_id": two, "text": "hm"},
        {"kind": "signal", "reply_id": two, "name": "dwell", "value": 3.5},
        {"kind": "signal", "reply_id": two, "name": "copied"},
    ]
    assert [give(quiet, **body).status_code for body in bodies] == [202] * 8
    said = [one for one in quiet.said() if isinstance(one, Feedback)]
    assert [(one.kind, one.value, one.aspect, one.signal, one.content.text) for one in said] == [
        ("thumb", 0.0, "safety", None, None),
        ("rating", 4.0, "overall", None, None),
        ("preference", None, "overall", None, None),
        ("ranking", None, "overall", None, None),
        ("correction", None, "overall", None, "better so"),
        ("comment", None, "overall", None, "hm"),
        ("signal", 3.5, "overall", "dwell", None),
        ("signal", None, "overall", "copied", None),
    ]
    assert said[2].reply_ids == (f"{one}:1", one)
    assert said[3].reply_ids == (two, one, f"{one}:1")


def test_the_same_again_is_the_same_receipt_and_one_event(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up", "user": "ann", "id": "click-1"}
    answers = [give(quiet, **body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202] * 3
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(quiet.said()) == 1
    assert quiet.metric("heed_feedback_total", kind="thumb", outcome="repeated") == 2


def test_the_same_id_with_another_body_is_a_conflict(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "user": "ann", "id": "click-1"}
    assert give(quiet, **body, value="up").status_code == 202
    answer = give(quiet, **body, value="down")
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (409, "conflict", "id")
    assert "'click-1'" in error_of(answer)["message"]
    assert len(quiet.said()) == 1


def test_ids_are_the_callers_own(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up", "id": "1"}
    receipts = [give(quiet, **body, user=user).json()["id"] for user in ("ann", "bob")]
    receipts.append(give(quiet, **body).json()["id"])
    assert len(set(receipts)) == 3
    assert len(quiet.said()) == 3


def test_without_an_id_the_same_words_count_twice(quiet: Served):
    body = {"kind": "comment", "reply_id": reply(quiet), "text": "hm"}
    assert give(quiet, **body).json()["id"] != give(quiet, **body).json()["id"]
    assert len(quiet.said()) == 2


def test_the_key_may_come_as_a_header(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up"}
    by_header = give(quiet, {"Idempotency-Key": "k"}, **body).json()
    assert give(quiet, **body, id="k").json() == by_header
    assert give(quiet, {"idempotency-key": "k"}, **body, id="k").json() == by_header
    differs = give(quiet, {"Idempotency-Key": "k"}, **body, id="other")
    assert (differs.status_code, error_of(differs)["param"]) == (422, "id")
    assert give(quiet, {"Idempotency-Key": "k" * 257}, **body).status_code == 422
    conflict = give(quiet, {"Idempotency-Key": "k"}, **{**body, "value": "down"})
    assert (conflict.status_code, "'k'" in error_of(conflict)["message"]) == (409, True)
    assert len(quiet.said()) == 1


def test_what_a_proxy_sends_again_counts_once(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up"}
    receipts = [give(quiet, {"X-Heed-Once": "r"}, **body).json()["id"] for _ in range(2)]
    assert receipts[0] == receipts[1]
    assert len(quiet.said()) == 1
    others = [
        give(quiet, {"X-Heed-Once": "r"}, **body | {"value": "down"}),
        give(quiet, {"X-Heed-Once": "s"}, **body),
    ]
    assert [other.status_code for other in others] == [202, 202]
    keyed = [give(quiet, {"X-Heed-Once": name}, **body, id="k").json()["id"] for name in "rs"]
    assert keyed[0] == keyed[1]
    assert len({*receipts, *keyed, *(other.json()["id"] for other in others)}) == 4
    assert len(quiet.said()) == 4


def test_one_request_id_for_all_that_a_client_sends_loses_no_change_of_mind(quiet: Served):
    body = {"kind": "thumb", "reply_id": reply(quiet), "user": "ann"}
    for value in ("up", "down", "up"):
        give(quiet, {"X-Request-ID": "the session"}, **body, value=value)
    assert [said.value for said in quiet.said()] == [1, 0, 1]


def test_posts_at_the_same_moment_are_one_event(quiet: Served):
    body = {"kind": "rating", "reply_id": reply(quiet), "value": 3, "id": "once"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: give(quiet, **body), range(24)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(quiet.said()) == 1


def test_of_different_posts_at_the_same_moment_one_wins(serve_with: Callable[..., Served]):
    troubles: list[TroubledLog] = []
    quiet = serve_with(speaks=False, log=lambda log: troubles.append(TroubledLog(log)) or troubles[0])
    body = {"kind": "rating", "reply_id": reply(quiet), "id": "once"}
    troubles[0].answers.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: give(quiet, **body, value=1))
        quiet.until(lambda: len(quiet.said()) == 1)
        assert give(quiet, **body, value=2).status_code == 409  # while the first is on its way
        same = pool.submit(lambda: give(quiet, **body, value=1))
        time.sleep(0.2)
        assert not first.done()
        assert not same.done()  # nobody is told so before it is durable
        troubles[0].answers.set()
        assert first.result().json() == same.result().json()
    assert len(quiet.said()) == 1


def test_a_retry_gets_its_receipt_even_when_the_board_was_emptied(serve_with: Callable[..., Served], tmp_path: Any):
    quiet = serve_with(speaks=False)
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up", "id": "1"}
    first = give(quiet, **body).json()
    quiet.ask(quiet.wiring.board.close())
    for path in (tmp_path / "data" / "board").iterdir():
        path.unlink()
    assert give(quiet, **body).json() == first
    assert quiet.http.get(f"/v1/feedback/{first['id']}").status_code == 200
    bodies = {one.body for one in quiet.said() if isinstance(one, Feedback)}
    assert len(bodies) == 1  # by which the learner counts the second event as a duplicate, and would know a conflict


@pytest.mark.parametrize("name", ["reply_id", "chosen", "rejected", "reply_ids"])
def test_unknown_and_foreign_replies_are_404(quiet: Served, tmp_path: Any, name: str):
    (tmp_path / "foreign").mkdir()
    foreign = Ids(load_secret(FeedbackConfig(data=tmp_path / "foreign"))).new_reply("", kept=True)
    ours = reply(quiet)
    for unknown in (foreign, "chatcmpl-unknown", f"{ours}:1"):
        bodies: dict[str, dict[str, Any]] = {
            "reply_id": {"kind": "comment", "reply_id": unknown, "text": "x"},
            "chosen": {"kind": "preference", "chosen": unknown, "rejected": ours},
            "rejected": {"kind": "preference", "chosen": ours, "rejected": unknown},
            "reply_ids": {"kind": "ranking", "reply_ids": [ours, unknown]},
        }
        answer = give(quiet, **bodies[name])
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_reply")
    assert quiet.said() == []


def test_a_reply_that_was_not_kept_cannot_be_rated(quiet: Served):
    answer = give(quiet, kind="thumb", reply_id=reply(quiet, kept=False), value="up")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_stored")


def test_malformed_feedback_is_422_and_no_json_is_400(quiet: Served):
    answer = give(quiet, kind="rating", reply_id=reply(quiet), value=9)
    assert (answer.status_code, error_of(answer)["param"]) == (422, "value")
    broken = quiet.http.post("/v1/feedback", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_json")
    assert quiet.metric("heed_feedback_total", kind="unknown", outcome="malformed") == 2


def test_when_the_log_is_full_nothing_is_claimed_and_a_retry_counts_once(serve_with: Callable[..., Served]):
    troubles: list[TroubledLog] = []
    quiet = serve_with(speaks=False, log=lambda log: troubles.append(TroubledLog(log)) or troubles[0])
    body = {"kind": "thumb", "reply_id": reply(quiet), "value": "up", "id": "1"}
    troubles[0].full.set()
    answer = give(quiet, **body)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "log_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert "No space left" in error_of(answer)["message"]
    assert quiet.said() == []
    troubles[0].full.clear()
    assert give(quiet, **body).status_code == 202
    assert len(quiet.said()) == 1
    troubles[0].full.set()
    receipt = give(quiet, **body)  # known by now, so that it needs no log
    assert receipt.status_code == 202
    assert quiet.http.delete(f"/v1/feedback/{receipt.json()['id']}").status_code == 503
    assert quiet.http.get(f"/v1/feedback/{receipt.json()['id']}").json()["status"] == "accepted"


def test_the_story_goes_from_acceptance_to_being_served(quiet: Served):
    receipt = give(quiet, kind="thumb", reply_id=reply(quiet), value="up").json()["id"]
    told = quiet.http.get(f"/v1/feedback/{receipt}").json()
    assert (told["id"], told["kind"], told["status"]) == (receipt, "thumb", "accepted")
    accepted = told["history"][0]["at"]
    assert abs(accepted - time.time()) < 60
    steps = [
        Story("joined", accepted + 1),
        Story("in_reward_model", accepted + 2, update=4),
        Story("in_version", accepted + 3, update=4, version=3),
    ]
    quiet.ask(quiet.wiring.board.write_story(receipt, steps))
    assert quiet.http.get(f"/v1/feedback/{receipt}").json()["status"] == "in_version"
    quiet.ask(quiet.wiring.board.activated(3, accepted + 5))
    told = quiet.http.get(f"/v1/feedback/{receipt}").json()
    assert told["status"] == "served"
    assert told["history"] == [
        {"status": "accepted", "at": accepted},
        {"status": "joined", "at": accepted + 1},
        {"status": "in_reward_model", "at": accepted + 2, "update": 4},
        {"status": "in_version", "at": accepted + 3, "update": 4, "version": "v3"},
        {"status": "served", "at": accepted + 5, "update": 4, "version": "v3"},
    ]


def test_a_dropped_feedback_says_why(quiet: Served):
    receipt = give(quiet, kind="thumb", reply_id=reply(quiet), value="up").json()["id"]
    quiet.ask(quiet.wiring.board.write_story(receipt, [Story("dropped", time.time(), reason="no_exchange")]))
    told = quiet.http.get(f"/v1/feedback/{receipt}").json()
    assert (told["status"], told["history"][-1]["reason"]) == ("dropped", "no_exchange")


def test_what_is_retracted_stops_counting_once(quiet: Served):
    receipt = give(quiet, kind="thumb", reply_id=reply(quiet), value="up").json()["id"]
    for _ in range(2):
        answer = quiet.http.delete(f"/v1/feedback/{receipt}")
        assert (answer.status_code, answer.json()) == (200, {"id": receipt, "status": "retracted"})
    said = quiet.said()
    assert [type(one) for one in said] == [Feedback, Retraction]
    assert said[1].id == receipt
    assert quiet.http.get(f"/v1/feedback/{receipt}").json()["status"] == "retracted"
    assert quiet.metric("heed_feedback_total", kind="thumb", outcome="retracted") == 1


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["fb-nothing", "chatcmpl-x", "fb-" + "a" * 40])
def test_a_feedback_that_is_none_of_ours_is_404(quiet: Served, method: str, name: str):
    answer = quiet.http.request(method, f"/v1/feedback/{name}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_feedback")


def test_values_are_counted_for_the_role_of_the_version_that_spoke(server: Served):
    def counted(kind: str, value: str, role: str) -> float:
        labels = {"policy": "default", "kind": kind, "value": value, "role": role}
        return server.metric("heed_feedback_value_total", **labels)

    base = server.chat().json()["id"]
    server.publish(1)
    current = server.chat().json()["id"]
    give(server, kind="thumb", reply_id=base, value="down")
    give(server, kind="thumb", reply_id=current, value="up")
    server.until(lambda: counted("thumb", "down", "base") == counted("thumb", "up", "current") == 1)
    for number, role in ((2, "previous"), (3, "older")):
        server.publish(number)
        give(server, kind="rating", reply_id=current, value=5)
        server.until(lambda role=role: counted("rating", "5", role) == 1)


def test_posts_of_feedback_are_counted_under_their_own_route(server: Served):
    give(server, kind="thumb", reply_id=reply(server), value="up")
    assert server.http.put("/v1/feedback").status_code == 405
    for status in ("202", "405"):  # each is counted once it is answered
        server.until(
            lambda status=status: server.metric("heed_requests_total", route="/v1/feedback", status=status) == 1
        )
