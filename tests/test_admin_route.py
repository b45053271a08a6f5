"""An operator's hand: with a token only, and never half a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.served import Served

ROUTES = ("promote", "rollback", "pause", "resume", "update")
TOKEN = {"authorization": "Bearer let-me-in"}


def post(server: Served, route: str, body: Any = None, headers: dict[str, str] = TOKEN) -> httpx.Response:
    return server.http.post(f"/admin/{route}", json=body, headers=headers)


@pytest.fixture
def quiet(serve_with: Callable[..., Served]) -> Served:
    return serve_with(speaks=False)


def test_without_a_token_set_the_routes_do_not_exist(serve_with: Callable[..., Served]):
    server = serve_with(speaks=False, admin_token=None)
    for route in ROUTES:
        for headers in (TOKEN, {}, {"authorization": "Bearer x"}):
            answer = post(server, route, {}, headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer x"},
        {"authorization": "Bearer let-me-in-too"},
        {"authorization": "Basic let-me-in"},
        {"authorization": "let-me-in"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_the_wrong_token_changes_nothing(quiet: Served, headers: dict[str, Any]):
    for route in ROUTES:
        answer = post(quiet, route, {"version": "v0"} if route == "promote" else {}, headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_token")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert quiet.wiring.store.release().generation == 0
    assert quiet.ask(quiet.wiring.board.update_asked()) is None


def test_promote_and_roll_back_are_followed_by_what_speaks(server: Served):
    version = server.publish(promote=False)
    speaker = server.wiring.speaker
    assert speaker is not None
    told = post(server, "promote", {"version": f"v{version}", "reason": "looks good"}).json()
    assert (told["current"], told["last_good"], told["generation"]) == (f"v{version}", "v0", 1)
    server.until(lambda: speaker.engine.current == version)
    assert server.wiring.store.release().changes[-1].reason == "looks good"
    assert server.wiring.store.release().changes[-1].by == "operator"
    assert post(server, "rollback").json()["current"] == "v0"
    server.until(lambda: speaker.engine.current == 0)
    assert server.chat(model=f"default@v{version}").json()["model"] == f"default@v{version}"


def test_pause_and_resume(quiet: Served):
    assert post(quiet, "pause", {"reason": "holidays"}).json()["paused"] is True
    assert quiet.http.get("/v1/policy").json()["paused"] is True
    assert post(quiet, "resume").json()["paused"] is False


def test_update_asks_the_learner(quiet: Served):
    answer = post(quiet, "update")
    assert (answer.status_code, answer.json()) == (202, {"status": "asked"})
    assert quiet.ask(quiet.wiring.board.update_asked()) is not None


def test_what_cannot_be_done_is_refused_and_changes_nothing(server: Served):
    missing = post(server, "promote", {"version": "v9"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "version")
    nothing = post(server, "rollback")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "refused")
    torn = server.publish(promote=False)
    (server.wiring.store.folder / f"v{torn:06d}" / "adapter_model.safetensors").write_bytes(b"torn")
    broken = post(server, "promote", {"version": torn})
    assert (broken.status_code, "digest" in broken.json()["error"]["message"]) == (409, True)
    assert server.wiring.store.release().generation == 0


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("promote", None, "version"),
        ("promote", {"version": "three"}, "version"),
        ("promote", {"version": "v1", "now": True}, "now"),
        ("rollback", {"version": "v1"}, "version"),
        ("pause", {"reason": 5}, "reason"),
        ("pause", {"reason": "x" * 501}, "reason"),
    ],
)
def test_malformed_commands_are_422(quiet: Served, route: str, body: Any, param: str):
    answer = post(quiet, route, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_a_release_file_that_is_broken_is_not_overwritten(quiet: Served):
    quiet.wiring.store.folder.mkdir(parents=True)
    (quiet.wiring.store.folder / "release.json").write_text("{torn")
    answer = post(quiet, "pause")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert (quiet.wiring.store.folder / "release.json").read_text() == "{torn"
