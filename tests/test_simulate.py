"""Simulated people over HTTP, against a small scripted server whose second version says what they like."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.client import Client, Refused
from deploy.simulate import Plan, Tally, cast_of, kinds_of, prompts_of, run, schedule, simulate

Json = dict[str, Any]
PROMPTS = ["Hello", "What is the capital of France?", "Tell me a joke"]


class Scripted(ThreadingHTTPServer):
    """v0 uses an emoji in every third reply; once `swap_after` pieces of feedback came, v1 does in every one."""

    daemon_threads = True

    def __init__(self, swap_after: int = 10**9, refuse: list[tuple[int, Json]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.swap_after = swap_after
        self.refuse = refuse or []
        """Statuses and headers of the first answers, before the real ones."""
        self.feedback: list[Json] = []
        self.chats: list[Json] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def version(self) -> int:
        return int(len(self.feedback) >= self.swap_after)

    def chat(self, body: Json) -> Json:
        self.chats.append(body)
        count = len(self.chats)
        texts = [
            "Sure thing 🙂" if self.version or (count + i) % 3 == 0 else "Sure thing." for i in range(body.get("n", 1))
        ]
        return {
            "id": f"chatcmpl-{count}",
            "model": f"default@v{self.version}",
            "choices": [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)],
            "usage": {"completion_tokens": 3},
        }


class Answer(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.reply(200, {"current": f"v{self.server.version}"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            if self.server.refuse:
                status, headers = self.server.refuse.pop(0)
                self.reply(status, {"error": {"message": "the words of the server"}}, headers)
            elif self.path == "/v1/feedback":
                self.server.feedback.append(body)
                self.reply(202, {"id": f"fb-{len(self.server.feedback)}", "status": "accepted"})
            else:
                self.reply(200, self.server.chat(body))

    def reply(self, status: int, body: Json, headers: Json | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted(swap_after=40) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def have(server: Scripted, prompts: Path, **changes: Any) -> tuple[Json, str]:
    """Runs a small simulation; returns its summary and what was shown."""
    plan = Plan(server.url, prompts=prompts, **{"exchanges": 60, "raters": 6, "noise": 0.0, "wait_s": 5.0, **changes})
    tally, screen = Tally(), io.StringIO()
    asyncio.run(simulate(plan, cast_of(plan), prompts_of(plan), kinds_of(plan), tally))
    run(Plan(server.url, prompts=prompts, exchanges=1, wait_s=0), Console(file=screen, width=100), as_json=False)
    return tally.summary(plan), screen.getvalue()


def test_before_and_after_are_told_apart_by_version(scripted: Scripted, prompts: Path):
    summary, shown = have(scripted, prompts)
    assert summary["before"]["version"] == "v0"
    assert summary["before"]["liked"] == pytest.approx(1 / 3, abs=0.1)
    assert summary["after"] == {"version": "v1", "replies": summary["after"]["replies"], "liked": 1.0}
    assert summary["feedback"] == {"thumb": 60}
    assert "people who like: emoji" in shown


def test_after_the_feedback_they_are_asked_what_they_think_of_the_newest_version(scripted: Scripted, prompts: Path):
    scripted.swap_after = 60  # the new version comes only with the last thumb
    summary, _ = have(scripted, prompts)
    assert summary["after"]["version"] == "v1"
    assert summary["after"]["replies"] >= 50
    assert len(scripted.feedback) == 61  # and asked, they rate nothing more (one is of the run that shows the table)


def test_thumbs_say_what_the_rater_thinks(scripted: Scripted, prompts: Path):
    have(scripted, prompts, wait_s=0.0)
    said = Counter(body["value"] for body in scripted.feedback[:40])
    assert said["up"] / 40 == pytest.approx(1 / 3, abs=0.1)
    assert {body["user"] for body in scripted.feedback} >= {f"rater-{i:03d}" for i in range(1, 7)}


def test_every_kind_has_its_body(scripted: Scripted, prompts: Path):
    have(scripted, prompts, kinds="thumb,rating,preference,correction", wait_s=0.0)
    by_kind = {body["kind"]: body for body in scripted.feedback}
    assert set(by_kind) == {"thumb", "rating", "preference", "correction"}
    assert by_kind["rating"]["value"] in range(1, 6)
    assert by_kind["preference"].keys() == {"kind", "chosen", "rejected", "user"}
    assert {by_kind["preference"]["chosen"].partition(":")[2], by_kind["preference"]["rejected"].partition(":")[2]} == {
        "",
        "1",
    }
    assert "🙂" in by_kind["correction"]["text"]


def test_a_busy_server_is_asked_again_when_it_says(scripted: Scripted, prompts: Path):
    scripted.refuse = [(429, {"retry-after": "1"}), (503, {}), (429, {"retry-after": "soon"})]
    summary, _ = have(scripted, prompts, exchanges=5, at_once=1, wait_s=0.0)
    assert summary["exchanges"] == 5


def test_patience_ends(scripted: Scripted):
    scripted.refuse = [(503, {"retry-after": "1"})] * 100

    async def ask() -> None:
        async with Client(scripted.url, patience_s=0.5) as client:
            await client.ask("Hello")

    with pytest.raises(Refused, match="503 the words of the server"):
        asyncio.run(ask())


def test_any_other_refusal_ends_it_with_the_words_of_the_server(scripted: Scripted, prompts: Path):
    scripted.refuse = [(400, {})]
    with pytest.raises(Refused, match="POST /v1/chat/completions: 400 the words of the server"):
        have(scripted, prompts, at_once=1)


def test_nobody_there_is_said_at_once():
    with Scripted() as gone:
        url = gone.url
    with pytest.raises(Refused, match=r"cannot be reached .* Is `heed up` running\?"):
        asyncio.run(simulate(Plan(url), [], PROMPTS, ["thumb"], Tally()))


def test_each_prompt_is_used_once_before_any_comes_again_and_the_seed_decides_the_order():
    plan = Plan("http://unused")
    people = cast_of(plan)
    turns = list(schedule(plan, people, PROMPTS, ["thumb", "rating"], 7))
    said = [prompt for _, prompt, _ in turns]
    assert sorted(said[:3]) == sorted(said[3:6]) == sorted(PROMPTS)
    assert [rater.user for rater, _, _ in turns] == [rater.user for rater in people[:7]]
    assert [kind for _, _, kind in turns] == ["thumb", "rating"] * 3 + ["thumb"]
    assert turns == list(schedule(plan, people, PROMPTS, ["thumb", "rating"], 7))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"taste": "purple"}, "known are short, long"), ({"kinds": "thumb,applause"}, "must be one or more of thumb")],
)
def test_a_wrong_wish_names_what_there_is(changes: Json, words: str):
    plan = Plan("http://unused", **changes)
    with pytest.raises(Refused, match=words):
        (cast_of(plan), kinds_of(plan))


def test_prompts_must_be_an_array_of_strings(tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text('{"not": "an array"}')
    with pytest.raises(Refused, match="must be a JSON array of strings"):
        prompts_of(Plan("http://unused", prompts=path))
