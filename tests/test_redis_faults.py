"""Servers that share a Redis: what they gain by it, and that no request fails when it is slow, full or gone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from feedback.board import WORK_HINT

if TYPE_CHECKING:
    from tests.served import Served
    from tests.valkey import Valkey

ServeWith = Callable[..., "Served"]


@pytest.fixture
def server(serve_with: ServeWith, valkey: Valkey) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        stack.callback(valkey.make_well)  # before the server stops
        yield serve_with(redis_url=valkey.url)


def rate(server: Served, reply_id: str, **more: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/feedback", json={"kind": "thumb", "reply_id": reply_id, "value": "up", **more})
    assert answer.status_code == 202, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


TROUBLES: dict[str, Callable[[Valkey], None]] = {
    "paused": lambda valkey: valkey.pause(),
    "killed": lambda valkey: valkey.kill(),
    "full": lambda valkey: valkey.fill(),
    "emptied": lambda valkey: valkey.flush(),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_chats_and_feedback_go_on_whatever_happens_to_redis(server: Served, valkey: Valkey, trouble: str):
    first = server.chat().json()
    before = rate(server, first["id"], id="first")
    TROUBLES[trouble](valkey)
    for _ in range(5):
        begin = time.monotonic()
        reply = server.chat().json()
        assert reply["heed"]["kept"]
        receipt = rate(server, reply["id"])
        assert server.http.get(f"/v1/feedback/{receipt['id']}").json()["status"] == "accepted"
        assert server.http.get("/v1/policy").status_code == 200
        assert server.http.get("/ready").status_code == 200
        assert time.monotonic() - begin < 3
    assert rate(server, first["id"], id="first") == before
    server.http.delete(f"/v1/feedback/{before['id']}").raise_for_status()
    admin = {"authorization": "Bearer let-me-in"}
    assert server.http.post("/admin/update", headers=admin).status_code == 202
    assert len(server.exchanges()) == 6


def test_a_start_does_not_wait_for_redis(serve_with: ServeWith, valkey: Valkey):
    valkey.pause()
    server = serve_with(redis_url=valkey.url)
    assert server.chat().status_code == 200
    valkey.resume()


def test_what_one_server_said_the_others_know(serve_with: ServeWith, server: Served, valkey: Valkey, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_bytes((tmp_path / "data" / "secret").read_bytes())
    other = serve_with(redis_url=valkey.url, data=tmp_path / "other")
    reply = server.chat("hello").json()
    kept = server.http.get(f"/v1/replies/{reply['id']}").json()
    server.until(lambda: other.http.get(f"/v1/replies/{reply['id']}").json() == kept)
    said = reply["choices"][0]["message"]["content"]
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    body = {"model": "default", "max_tokens": 6, "messages": [*messages, {"role": "user", "content": "and?"}]}
    other.http.post("/v1/chat/completions", json=body).raise_for_status()
    [second] = other.exchanges()
    [first] = server.exchanges()
    assert (second.conversation, first.turn, second.turn) == (first.conversation, 0, 1)
    assert rate(server, reply["id"], id="1") == rate(other, reply["id"], id="1")
    assert other.said() == []  # known as accepted already


def test_a_change_of_the_release_is_followed_at_once_and_feedback_wakes_the_learner(server: Served, valkey: Valkey):
    speaker = server.wiring.speaker
    assert speaker is not None
    speaker.swapper._poll_s = 600.0
    time.sleep(0.5)  # the look that is waited for
    version = server.publish(promote=False)
    server.until(lambda: valkey.command("PUBSUB", "NUMSUB", "heed:default:hint:release")[1] == 1)
    body = {"version": f"v{version}"}
    server.http.post("/admin/promote", json=body, headers={"authorization": "Bearer let-me-in"}).raise_for_status()
    server.until(lambda: speaker.engine.current == version, seconds=30)
    assert not server.ask(server.wiring.board.wait_for_hint(WORK_HINT, 0.1))
    rate(server, server.chat().json()["id"])
    assert server.ask(server.wiring.board.wait_for_hint(WORK_HINT, 5))
