"""Lines of the log: whose they are, which request they are about, and that nobody's words or keys are in them."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deploy.logs import ROOMS, formatter
from deploy.welcome import environ_of_children
from feedback.config import load
from learner.config import LearnerConfig
from serving.routes import chat
from tests.served import Served, TroubledLog, config_for, served
from tests.test_keys import header, table

ROOT = Path(__file__).resolve().parent.parent
REQUEST = {"timestamp", "level", "process", "logger", "event", "method", "route", "status", "seconds", "request_id"}


class Lines:
    """All that is logged, from level info on, as the server writes it where programs read it."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def answered(self) -> list[dict[str, Any]]:
        return [line for line in self.all() if line["logger"] == "serving.access"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Served]:
    """One for all tests here that change nothing about it."""
    with served(config_for(tmp_path_factory.mktemp("logs") / "data", model_folder)) as one:
        yield one


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    told = Lines()
    handler = logging.StreamHandler(told.stream)
    handler.setFormatter(formatter("server", pretty=False))
    root = logging.getLogger()
    root.addHandler(handler)
    for room in ROOMS:
        monkeypatch.setattr(logging.getLogger(room), "level", logging.INFO)
    root.manager._clear_cache()  # type: ignore[attr-defined]
    yield told
    root.removeHandler(handler)
    monkeypatch.undo()
    root.manager._clear_cache()  # type: ignore[attr-defined]


def test_a_request_leaves_one_line_that_says_how_it_went_and_which_version_spoke(server: Served, lines: Lines):
    version = server.publish()
    answer = server.chat(stream=True)
    server.until(lambda: len(lines.answered()) == 1)
    [line] = lines.answered()
    assert set(line) == REQUEST | {"version"}
    assert list(line)[:3] == ["timestamp", "level", "process"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])
    assert (line["level"], line["process"], line["event"]) == ("info", "server", "answered")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["version"] == answer.headers["x-heed-version"] == f"default@v{version}"
    assert line["request_id"] == answer.headers["x-request-id"]
    assert 0 < line["seconds"] < 60


def test_what_machines_ask_again_and_again_leaves_none(server: Served, lines: Lines):
    for path in ("/health", "/ready", "/metrics", "/", "/static/page.js", "/v1/models"):
        assert server.http.get(path).status_code == 200
    server.until(lambda: bool(lines.answered()))
    assert [line["route"] for line in lines.answered()] == ["/v1/models"]


def test_of_a_path_only_the_template_is_told_and_nothing_of_a_query(server: Served, lines: Lines):
    reply = server.chat().json()["id"]
    assert server.http.get(f"/v1/replies/{reply}?token=secret").status_code == 200
    assert server.http.get("/no/such/secret").status_code == 404
    server.until(lambda: len(lines.answered()) == 3)
    assert [line["route"] for line in lines.answered()[1:]] == ["/v1/replies/{reply_id}", "other"]
    assert "secret" not in lines.text


def test_of_a_method_that_nobody_knows_it_is_told_that_it_was_another(server: Served, lines: Lines):
    assert server.http.request("MARKER", "/v1/models").status_code == 405
    server.until(lambda: bool(lines.answered()))
    assert [line["method"] for line in lines.answered()] == ["_OTHER"]
    assert "MARKER" not in lines.text


@pytest.mark.parametrize("given", ["7f3c", "req_" + "a" * 124, "trace/1:2=3+4"])
def test_a_clients_own_request_id_is_taken_and_sent_back(server: Served, lines: Lines, given: str):
    answer = server.http.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]
    server.until(lambda: bool(lines.answered()))
    assert lines.answered()[0]["request_id"] == given


@pytest.mark.parametrize("given", [b"", b"a" * 129, b"two words", b"caf\xc3\xa9", b"tab\there"])
def test_one_that_cannot_stand_in_a_line_is_replaced_by_one_of_ours(server: Served, lines: Lines, given: bytes):
    made = [server.http.get("/v1/models", headers={b"x-request-id": given}).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", one) for one in made)
    server.until(lambda: len(lines.answered()) == 2)
    assert [line["request_id"] for line in lines.answered()] == made
    assert made[0] != made[1]


def test_errors_bear_the_id_too_whatever_went_wrong(server: Served, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "_models", lambda *_: 1 / 0)
    wanted = {"/v1/models": 500, "/v1/feedback/fb-unknown": 404}
    for path, status in wanted.items():
        answer = server.http.get(path, headers={"x-request-id": f"of {status}".replace(" ", "-")})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, f"of-{status}")
    server.until(lambda: len(lines.all()) == 3)
    failed, warned, refused = lines.all()
    assert (failed["level"], failed["logger"], failed["request_id"]) == ("error", "serving.routes.door", "of-500")
    assert failed["event"] == "GET /v1/models failed"
    assert "ZeroDivisionError" in failed["exception"]
    assert (warned["level"], warned["status"], refused["level"], refused["status"]) == ("warning", 500, "info", 404)


def test_what_goes_wrong_after_the_engine_is_told_with_the_request_and_the_version(
    server: Served, lines: Lines, monkeypatch: pytest.MonkeyPatch
):
    """The end of a reply arrives from the engine's thread, which knows of no request."""
    monkeypatch.setattr(server.wiring.board, "put_exchange", lambda *_: 1 / 0)
    answers = [server.chat(n=2).headers for _ in range(2)]
    failed = [line for line in lines.all() if "the board failed on" in line["event"]]
    assert [line["request_id"] for line in failed] == [answer["x-request-id"] for answer in answers for _ in range(2)]
    assert {line["version"] for line in failed} == {answers[0]["x-heed-version"]}


MARK, KEY, WRONG = "MARKER-of-a-person", "MARKER-key-of-web", "MARKER-key-of-nobody"


def every_feedback(reply: str, other: str) -> list[dict[str, Any]]:
    said = {"user": f"{MARK}-user", "metadata": {"page": MARK}}
    bodies: list[dict[str, Any]] = [
        {"kind": "thumb", "reply_id": reply, "value": "up", "aspect": "overall"},
        {"kind": "rating", "reply_id": reply, "value": 4},
        {"kind": "preference", "chosen": reply, "rejected": other},
        {"kind": "ranking", "reply_ids": [reply, other]},
        {"kind": "correction", "reply_id": reply, "text": MARK},
        {"kind": "comment", "reply_id": reply, "text": MARK},
        {"kind": "signal", "reply_id": reply, "name": "copied"},
    ]
    return [body | said for body in bodies]


def test_nobodys_words_and_no_key_are_in_any_line(
    serve_with: Callable[..., Served], tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
):
    """Chats, feedback of every kind, whatever is malformed, wrong keys, a full log, a defect, a client that leaves."""
    file, logs = tmp_path / "keys.toml", list[TroubledLog]()
    file.write_text(table("web", KEY))

    def troubled(real: Any) -> TroubledLog:
        logs.append(TroubledLog(real))
        return logs[0]

    server = serve_with(api_keys_file=file, log=troubled)
    server.http.headers.update(header(KEY))

    def post(path: str, body: Any, **more: Any) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"content-type": "application/json"}
        return server.http.post(path, content=content, headers=kind | more.pop("headers", {}), **more).status_code

    message = {"role": "user", "content": MARK}
    asked = {"model": "default", "messages": [message], "max_tokens": 6, "user": MARK, "metadata": {"page": MARK}}
    give, ask = "/v1/feedback", "/v1/chat/completions"
    replies = [server.http.post(ask, json=asked | {"seed": seed, "stop": [MARK]}).json()["id"] for seed in range(2)]
    for body in every_feedback(replies[0], replies[1]):
        assert post(give, body) == 202
        assert post(give, body | {"id": MARK}, headers={"idempotency-key": MARK}) in (202, 409)
    refused = {
        post(ask, b'{"messages": "' + MARK.encode()),
        post(ask, asked | {"temperature": MARK}),
        post(ask, asked | {"model": MARK}),
        post(ask, asked | {"messages": [message | {"role": MARK}]}),
        post(ask, asked | {"messages": [{"role": "user", "content": MARK * 1000}]}),
        post(f"{ask}?api_key={KEY}&text={MARK}", asked | {MARK: 1}),
        post(f"/{MARK}", asked),
        post(give, {"kind": MARK}),
        post(give, {"kind": "comment", "reply_id": MARK, "text": MARK}),
        *(post(path, asked, headers=header(WRONG)) for path in (ask, give, "/admin/promote")),
    }
    assert refused == {400, 401, 404, 422}
    logs[0].full.set()
    assert post(give, every_feedback(*replies)[4]) == 503
    assert server.http.post(ask, json=asked).json()["heed"]["kept"] is False
    logs[0].full.clear()
    with monkeypatch.context() as broken:
        broken.setattr("serving.routes.chat.ask", lambda *_: {}["there is none"])
        assert post(ask, asked) == 500
    with monkeypatch.context() as broken:
        broken.setattr(server.wiring.board, "put_exchange", lambda *_: 1 / 0)
        assert post(ask, asked) == 200
    long = {"stream": True, "max_tokens": 150, "n": 4, "heed": {"ignore_eos": True}}
    with server.http.stream("POST", ask, json=asked | long) as leaving:
        next(leaving.iter_lines())
    server.until(lambda: server.exchanges()[-1].finish_reason == "abort")
    file.write_text(table("web", KEY, WRONG))
    server.until(lambda: post(ask, asked, headers=header(WRONG)) == 200)
    server.until(lambda: not server.wiring.tasks)
    assert {"info", "warning", "error"} <= {line["level"] for line in lines.all()}
    assert len(lines.answered()) > 30
    assert "MARKER" not in lines.text


def test_a_traceback_for_people_shows_no_values_and_is_short_of_nothing_else():
    line = line_of(KeyError("which"), pretty=True)
    assert line.splitlines()[0] == "12:00:00 [error] it failed                      [serving.some]"
    assert line.splitlines()[-1] == "KeyError: 'which'"
    assert "MARKER" not in line


def test_what_libraries_note_beside_a_line_is_left_out():
    assert "MARKER" not in line_of(None, extra={"color_message": MARK, "status": 200})
    assert json.loads(line_of(None, extra={"status": 200}))["status"] == 200


def line_of(error: Exception | None, *, pretty: bool = False, extra: dict[str, object] | None = None) -> str:
    """A line about `error`, raised where a local variable holds somebody's words."""
    info = None
    with suppress(Exception):
        words = MARK
        try:
            if error is not None:
                raise error
        except Exception:
            info = sys.exc_info()
            assert words
    record = logging.getLogger("serving.some").makeRecord(
        "serving.some", logging.ERROR, "some.py", 1, "it %s", ("failed",), info, extra=extra
    )
    return re.sub(r"^\d\d:\d\d:\d\d", "12:00:00", formatter("server", pretty=pretty).format(record))


SAYS = """
import logging, sys, warnings
from deploy.logs import set_up_logs
from serving.config import ServingConfig
set_up_logs(ServingConfig(**eval(sys.argv[1])), "learner", supervised=sys.argv[2] == "up")
for room in ("serving.access", "learner.loop", "httpx"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger(room).log(level, "%s of %s", logging.getLevelName(level), room)
warnings.warn("a library's own", stacklevel=1)
"""


@pytest.mark.parametrize(
    ("settings", "where", "expected"),
    [
        (
            {},
            "alone",
            "json: INFO of serving.access, WARNING of serving.access, INFO of learner.loop, WARNING of learner.loop",
        ),
        ({"log_format": "pretty"}, "up", "WARNING of serving.access, INFO of learner.loop, WARNING of learner.loop"),
        (
            {"log_format": "json", "log_level": "warning"},
            "up",
            "json: WARNING of serving.access, WARNING of learner.loop",
        ),
    ],
)
def test_the_settings_say_what_is_written_and_how(settings: dict[str, str], where: str, expected: str):
    done = subprocess.run(
        [sys.executable, "-c", SAYS, repr(settings), where], cwd=ROOT, capture_output=True, text=True, check=True
    )
    written = done.stderr.splitlines()
    as_json = written[0].startswith("{")
    events = [json.loads(line)["event"] for line in written] if as_json else written
    told = [found[0] for line in events if (found := re.search(r"[A-Z]+ of [a-z.]+", line))]
    assert ("json: " if as_json else "") + ", ".join(told) == expected + ", WARNING of httpx"
    assert "a library's own" in done.stderr
    assert not as_json or {json.loads(line)["process"] for line in written} == {"learner"}


def test_under_heed_up_people_read_what_the_children_write_unless_they_want_json():
    for told, handed_on in [({}, "pretty"), ({"HEED_LOG_FORMAT": "json"}, "json")]:
        config = load(LearnerConfig, environ=told, toml=None, flags={})
        assert environ_of_children(config, 8000, told)["HEED_LOG_FORMAT"] == handed_on
