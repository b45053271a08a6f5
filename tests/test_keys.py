"""API keys: who is let in, what is theirs, how much they may ask, and what a change of the file does."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Route

from feedback.config import SettingError
from feedback.events import Feedback
from serving.app import create_app
from serving.claims import CannotStart, listen
from serving.errors import UnknownKey
from serving.exits import Exit
from serving.keys import LOOK_EVERY_S, Keys
from serving.process import serve
from tests.served import Served, config_for

ADMIN = {"authorization": "Bearer let-me-in"}


def table(name: str, *keys: str, quota: int | None = None) -> str:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return f"[{name}]\nsha256 = {digests}\n" + ("" if quota is None else f"quota = {quota}\n")


def header(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(table("web", "web-key") + table("app", "app-key"))
    return path


@pytest.fixture
def keyed(serve_with: Callable[..., Served], file: Path) -> Served:
    """A server without a model whose callers need keys."""
    return serve_with(speaks=False, api_keys_file=file)


def reply(server: Served, key: str = "web", *, kept: bool = True) -> str:
    return server.wiring.ids.new_reply(key, kept=kept)


def give(server: Served, key: str, reply_id: str, **more: Any) -> httpx.Response:
    body = {"kind": "thumb", "reply_id": reply_id, "value": "up", **more}
    return server.http.post("/v1/feedback", json=body, headers=header(key))


# the file


def holder(keys: Keys, key: str) -> str:
    """The name of a key, "" where it is not known."""
    try:
        return keys.holder(f"Bearer {key}").name
    except UnknownKey:
        return ""


def test_a_key_is_known_by_its_digest(file: Path):
    keys = Keys(file)
    assert [holder(keys, key) for key in ("web-key", "app-key", "web", "", "web-key2")] == ["web", "app", "", "", ""]
    assert keys.holder("bearer \t web-key ").name == "web"
    for other in ("web-key", "Basic web-key", "Bearer", ""):
        with pytest.raises(UnknownKey):
            keys.holder(other)


def test_a_key_may_be_any_bytes_that_a_header_carries(file: Path):
    file.write_text(table("web", "ключ à"))
    assert Keys(file).holder("Bearer " + "ключ à".encode().decode("latin-1")).name == "web"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "holds no key"),
        ("[web", "is not valid TOML: "),
        ("\xff", "is not UTF-8 text"),
        ("sha256 = 'x'", "outside of all tables"),
        ("[web]", "[web] sha256 must be 64 hex digits"),
        ("[web]\nsha256 = 'hunter2'", "[web] sha256 must be 64 hex digits"),
        ("[web]\nsha256 = []", "[web] sha256 must be 64 hex digits"),
        (f"[web]\nsha256 = ['{'a' * 64}', 5]", "[web] sha256 must be 64 hex digits"),
        (f"[web]\nsha256 = '{'a' * 64}'\nquota = 0", "[web] quota must be a whole number from 1 to 1000000"),
        (f"[web]\nsha256 = '{'a' * 64}'\nquota = true", "[web] quota must be a whole number from 1 to 1000000"),
        (f"[web]\nsha256 = '{'a' * 64}'\nqouta = 5", "[web] qouta is not known; a key has sha256 and quota"),
        (f"['my web']\nsha256 = '{'a' * 64}'", "1 to 64 letters, digits"),
        (f"[a]\nsha256 = '{'a' * 64}'\n[b]\nsha256 = '{'A' * 64}'", "[b] has a sha256 that stands in [a] already"),
    ],
)
def test_a_wrong_file_refuses_the_start_in_one_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
):
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    assert serve(config_for(tmp_path / "data", model_folder, api_keys_file=path)) == Exit.SETTING
    told = capsys.readouterr().err
    assert told.startswith(f"heed: HEED_API_KEYS_FILE={path}: ")
    assert says in told
    assert told.count("\n") == 1
    assert "hunter2" not in told
    assert not (tmp_path / "data").exists()


def test_a_key_is_replaced_by_another_while_both_are_known(file: Path, monkeypatch: pytest.MonkeyPatch):
    keys = Keys(file)
    for known, lets_in in [(["web-key", "new"], ["web", "web"]), (["new"], ["", "web"])]:
        file.write_text(table("web", *known))
        _later(monkeypatch)
        assert [holder(keys, key) for key in ("web-key", "new")] == lets_in


def test_the_last_key_can_be_taken_away(file: Path, monkeypatch: pytest.MonkeyPatch):
    keys = Keys(file)
    file.write_text("# none\n")
    _later(monkeypatch)
    assert holder(keys, "web-key") == ""


@pytest.mark.parametrize("spoil", ["torn", "wrong", "gone"])
def test_a_file_that_goes_wrong_leaves_the_last_good_keys_in_force_and_is_told_of_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spoil: str
):
    keys, good = Keys(file), file.read_text()
    if spoil == "gone":
        file.unlink()
    else:
        file.write_text(good[:-30] if spoil == "torn" else good + "[third]\nsha256 = 'secret'\n")
    for _ in range(3):
        _later(monkeypatch)
        assert [holder(keys, key) for key in ("web-key", "app-key")] == ["web", "app"]
    [told] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(file) in told.getMessage()
    assert "stay in force" in told.getMessage()
    assert "secret" not in caplog.text
    file.write_text(table("app", "app-key"))
    _later(monkeypatch)
    assert [holder(keys, key) for key in ("web-key", "app-key")] == ["", "app"]


def test_the_file_is_read_at_most_once_a_second(file: Path, monkeypatch: pytest.MonkeyPatch):
    keys, reads = Keys(file), []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or b"")
    for _ in range(100):
        holder(keys, "web-key")
    assert reads == []
    _later(monkeypatch)
    for _ in range(100):
        holder(keys, "web-key")
    assert reads == [file]


def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time between two looks at the file pass."""
    now = time.monotonic() + LOOK_EVERY_S
    monkeypatch.setattr(time, "monotonic", lambda: now)


# at the door


def test_every_v1_route_needs_a_key_and_the_others_do_not(keyed: Served):
    parts = keyed.wiring
    app = create_app(parts.config, ids=parts.ids, log=parts.log, board=parts.board, store=parts.store)
    routes = [(path, method) for path, methods in app.openapi()["paths"].items() for method in methods]
    plain = [route for route in app.routes if type(route) is Route]
    routes += [(route.path, method) for route in plain for method in route.methods or ()]
    assert {
        ("/v1/chat/completions", "post"),
        ("/v1/feedback", "POST"),
        ("/v1/models", "get"),
        ("/v1/replies/{reply_id}", "get"),
    } < {*routes}
    for path, method in [(re.sub("{.*}", "x", path), method) for path, method in routes if path.startswith("/v1")]:
        for headers, says in [
            ({}, "needs an API key"),
            (header("wrong"), "not one of this server's"),
            ({"authorization": b"Bearer \xff\xfe"}, "not one of this server's"),
        ]:
            answer = keyed.http.request(method, path, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"], error["param"]) == (
                *(401, "invalid_request_error", "invalid_api_key", None),
            ), path
            assert says in error["message"]
            assert "wrong" not in error["message"]
            assert answer.headers["www-authenticate"] == "Bearer"
        assert keyed.http.request(method, path, headers=header("web-key")).status_code not in (401, 403)
    for path in ("/health", "/version", "/metrics", "/", "/static/page.js", "/prompts.json"):
        assert keyed.http.get(path).status_code == 200, path
    assert keyed.http.get("/ready").status_code == 503
    assert keyed.http.post("/admin/pause", headers=header("web-key")).json()["error"]["code"] == "invalid_admin_token"
    assert keyed.http.post("/admin/pause", headers=ADMIN).status_code == 200


def test_an_openai_client_is_told_by_its_own_error(serve_with: Callable[..., Served], file: Path):
    server = serve_with(api_keys_file=file)
    messages: Any = [{"role": "user", "content": "hello"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model="default", messages=messages)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="web-key", max_retries=0) as client:
        answer = client.chat.completions.create(model="default", messages=messages, max_tokens=4)
    assert server.wiring.ids.verify_reply(answer.id, "web").kept


@pytest.mark.parametrize("framing", ["content-length: 100000000", "transfer-encoding: chunked"])
def test_the_body_of_a_stranger_is_not_read(keyed: Served, framing: str):
    host, port = keyed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        head = f"POST /v1/feedback HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
        stranger.sendall(head.encode())
        told = b""
        while piece := stranger.recv(4096):  # to the end: the server hangs up
            told += piece
    assert told.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in told.lower()
    assert b"invalid_api_key" in told


def test_a_stranger_who_sends_all_the_same_is_cut_off(keyed: Served):
    host, port = keyed.url.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        stranger.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100_000_000:
                sent += stranger.send(b"x" * (1 << 20))
    assert sent < 20_000_000  # what the buffers of two sockets hold
    assert keyed.http.get("/v1/policy", headers=header("web-key")).status_code == 200


def test_a_stranger_with_few_words_keeps_the_connection(keyed: Served):
    for _ in range(2):
        answer = keyed.http.post("/v1/feedback", json={"kind": "thumb"})
        assert (answer.status_code, answer.headers.get("connection")) == (401, None)


def test_a_key_that_is_removed_stops_working_and_a_new_one_works_within_two_seconds(keyed: Served, file: Path):
    def status(key: str) -> int:
        return keyed.http.get("/v1/policy", headers=header(key)).status_code

    assert (status("web-key"), status("new-key")) == (200, 401)
    file.write_text(table("web", "new-key"))
    changed = time.monotonic()
    keyed.until(lambda: (status("web-key"), status("new-key")) == (401, 200), 2.0)
    assert time.monotonic() - changed < 2.0


def test_keys_are_never_logged(keyed: Served, file: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    give(keyed, "web-key", reply(keyed))
    give(keyed, "a-wrong-key", reply(keyed))
    file.write_text(table("web", "web-key", "other"))
    time.sleep(LOOK_EVERY_S)
    give(keyed, "web-key", reply(keyed))
    assert f"{file} was read again; its keys: web." in caplog.text
    assert "web-key" not in caplog.text
    assert "a-wrong-key" not in caplog.text


# whose is what


def test_a_reply_of_another_key_is_foreign_and_another_user_of_the_same_key_is_not(keyed: Served):
    one = reply(keyed, "web")
    foreign = give(keyed, "app-key", one, user="ann")
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "unknown_reply")
    assert [give(keyed, "web-key", one, user=user).status_code for user in ("ann", "bob")] == [202, 202]
    not_kept = reply(keyed, "web", kept=False)
    assert [give(keyed, key, not_kept).status_code for key in ("app-key", "web-key")] == [404, 409]


def test_the_story_of_another_keys_feedback_is_told_to_nobody_else_and_cannot_be_retracted(
    keyed: Served, tmp_path: Path
):
    for more in ({}, {"id": "1"}):
        receipt = give(keyed, "web-key", reply(keyed), **more).json()["id"]
        path = f"/v1/feedback/{receipt}"
        for method in ("GET", "DELETE"):
            foreign = keyed.http.request(method, path, headers=header("app-key"))
            assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "unknown_feedback")
            unknown = keyed.http.request(method, "/v1/feedback/fb-x", headers=header("app-key"))
            assert foreign.json()["error"]["message"].replace(receipt, "fb-x") == unknown.json()["error"]["message"]
        assert keyed.http.get(path, headers=header("web-key")).json()["status"] == "accepted"
        keyed.ask(keyed.wiring.board.close())
        for board in (tmp_path / "data" / "board").iterdir():
            board.unlink()
        assert keyed.http.get(path, headers=header("app-key")).status_code == 404  # though the board knows nothing
        assert keyed.http.delete(path, headers=header("web-key")).json()["status"] == "retracted"


def test_a_reply_is_shown_to_its_key_and_to_the_operator(keyed: Served):
    one = reply(keyed)
    keyed.ask(keyed.wiring.board.put_exchange(one, '{"id": "it"}'))
    seen = {
        key: keyed.http.get(f"/v1/replies/{one}", headers=header(key)) for key in ("web-key", "app-key", "let-me-in")
    }
    assert [seen[key].status_code for key in seen] == [200, 404, 200]
    assert seen["let-me-in"].json() == {"id": "it"}
    assert keyed.http.get("/v1/replies/chatcmpl-x", headers=ADMIN).status_code == 404
    assert keyed.http.get("/v1/policy", headers=ADMIN).status_code == 200
    for path in ("/v1/models", "/v1/feedback/fb-x"):  # an operator is no caller
        assert keyed.http.get(path, headers=ADMIN).status_code == 401


def test_without_an_admin_token_nobody_is_the_operator(serve_with: Callable[..., Served], file: Path):
    server = serve_with(speaks=False, api_keys_file=file, admin_token=None)
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": "bearer x"}, ADMIN):
        assert server.http.get(f"/v1/replies/{reply(server)}", headers=headers).status_code == 401


def test_two_keys_with_the_same_user_are_two_callers(keyed: Served):
    body = {"user": "ann", "id": "1"}
    answers = [
        give(keyed, "web-key", reply(keyed, "web"), **body),
        give(keyed, "app-key", reply(keyed, "app"), **body),
        give(keyed, "web-key", reply(keyed, "web"), **body | {"user": "bob"}),
        give(keyed, "web-key", reply(keyed, "web"), id="1"),
    ]
    assert [answer.status_code for answer in answers] == [202] * 4
    assert len({answer.json()["id"] for answer in answers}) == 4
    assert len({said.caller for said in keyed.said() if isinstance(said, Feedback)}) == 4


def test_a_retry_gets_its_receipt_under_any_of_a_keys_values(keyed: Served, file: Path):
    file.write_text(table("web", "web-key", "next-key"))
    one = reply(keyed)
    time.sleep(LOOK_EVERY_S)
    receipts = {give(keyed, key, one, user="ann", id="1").json()["id"] for key in ("web-key", "next-key")}
    assert len(receipts) == len(keyed.said()) == 1


def test_conversations_are_the_keys_own(serve_with: Callable[..., Served], file: Path):
    server = serve_with(api_keys_file=file)

    def say(key: str, *messages: str) -> dict[str, Any]:
        said = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), messages, strict=False)
        ]
        body = {"model": "default", "messages": said, "max_tokens": 4, "user": "ann"}
        answer: dict[str, Any] = server.http.post("/v1/chat/completions", json=body, headers=header(key)).json()
        return answer

    first = say("web-key", "hello")
    words = ("hello", first["choices"][0]["message"]["content"], "and?")
    mine, theirs = say("web-key", *words), say("app-key", *words)
    assert (mine["heed"]["conversation"], mine["heed"]["turn"]) == (first["heed"]["conversation"], 1)
    assert (theirs["heed"]["conversation"] == first["heed"]["conversation"], theirs["heed"]["turn"]) == (False, 0)


def test_ids_of_before_there_were_keys_can_still_be_used(serve_with: Callable[..., Served], file: Path):
    before = serve_with(speaks=False)
    old = reply(before, "")
    body = {"kind": "thumb", "reply_id": old, "value": "up", "user": "ann", "id": "1"}
    receipt = before.http.post("/v1/feedback", json=body).json()["id"]
    # to the byte what servers gave before there could be keys
    assert receipt == before.wiring.ids.new_feedback("user:ann", "1")
    before.wiring.keys = Keys(file)
    assert give(before, "web-key", old).status_code == 202
    assert give(before, "app-key", old).status_code == 202
    for method in ("GET", "DELETE"):
        assert before.http.request(method, f"/v1/feedback/{receipt}", headers=header("app-key")).status_code == 200
        assert before.http.request(method, f"/v1/feedback/{receipt}").status_code == 401


# quotas


@pytest.fixture
def metered(serve_with: Callable[..., Served], file: Path) -> Served:
    file.write_text(table("web", "web-key", quota=3) + table("app", "app-key"))
    return serve_with(speaks=False, api_keys_file=file)


def test_over_its_quota_a_key_is_refused_and_told_when_to_come_again(metered: Served):
    one = reply(metered)
    assert [give(metered, "web-key", one).status_code for _ in range(3)] == [202] * 3
    answer = give(metered, "web-key", one)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 20
    assert len(metered.said()) == 3
    assert give(metered, "app-key", reply(metered, "app")).status_code == 202  # another key's, and without a quota


def test_chats_and_feedback_count_and_looking_does_not(metered: Served):
    receipt = give(metered, "web-key", reply(metered)).json()["id"]
    for _ in range(5):
        for path in (f"/v1/feedback/{receipt}", "/v1/policy"):
            assert metered.http.get(path, headers=header("web-key")).status_code == 200
    body = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
    statuses = [
        metered.http.post("/v1/chat/completions", json=body, headers=header("web-key")).status_code for _ in range(3)
    ]
    assert statuses == [503, 503, 429]  # 503: no model is loaded here
    assert metered.http.delete(f"/v1/feedback/{receipt}", headers=header("web-key")).status_code == 200


def test_an_openai_client_is_told_of_its_quota_by_its_own_error(metered: Served):
    for _ in range(3):
        give(metered, "web-key", reply(metered))
    with (
        openai.OpenAI(base_url=f"{metered.url}/v1", api_key="web-key", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "hello"}])
    assert refused.value.code == "rate_limit_exceeded"


# who may listen to the world


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Host names, and what they stand for here."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def find(host: str, port: int, **more: Any) -> list[Any]:
        return [entry for name in known.get(host, [host]) for entry in real(name, port, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    return known


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.1", "half.example", "fe80::1%lo"])
def test_without_keys_only_this_machine_is_listened_to(names: dict[str, list[str]], host: str):
    names["half.example"] = ["127.0.0.1", "203.0.113.1"]
    with pytest.raises(CannotStart, match=r"HEED_API_KEYS_FILE .* HEED_INSECURE=1 \(--insecure\)") as refused:
        listen(host, 0, private=True)
    assert refused.value.code == Exit.SETTING
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "mine.example"])
def test_loopback_needs_no_keys(names: dict[str, list[str]], host: str):
    names["mine.example"] = ["127.0.0.1"]
    for opened in listen(host, 0, private=True):
        opened.close()


def test_a_server_for_the_world_starts_with_keys_or_when_it_is_meant(
    tmp_path: Path, model_folder: Path, file: Path, capsys: pytest.CaptureFixture[str]
):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]

        def start(**settings: Any) -> tuple[int, str]:
            code = serve(config_for(tmp_path / "data", model_folder, host="0.0.0.0", port=port, **settings))
            return code, capsys.readouterr().err

        code, told = start()
        assert (code, told.count("\n"), "HEED_HOST=0.0.0.0" in told) == (Exit.SETTING, 1, True)
        # let in, they get as far as the port, which is taken
        assert start(insecure=True)[0] == Exit.PORT
        assert start(api_keys_file=file)[0] == Exit.PORT


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(SettingError, match="cannot be read: Is a directory"):
        Keys(tmp_path)
