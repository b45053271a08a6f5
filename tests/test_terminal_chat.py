"""`heed chat` and `heed simulate` against a real server: what people type reaches the log."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from deploy.chat import chat, harmless
from deploy.client import Refused
from deploy.door import server as address_and_key
from deploy.simulate import Plan, Tally, cast_of, simulate
from feedback.config import SettingError
from feedback.events import Feedback
from serving.model import find_model
from tests.served import Served


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The built-in model: its replies end."""
    return find_model(None)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return io.StringIO()


def talk(server: Served, screen: io.StringIO, *lines: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Types these lines into `heed chat`, then Ctrl-D; returns what was shown."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(server.url, "ann", "default", Console(file=screen, width=200))
    return screen.getvalue()


def test_replies_stream_and_say_who_spoke(server: Served, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    shown = talk(server, screen, "hello", "and again", monkeypatch=monkeypatch)
    assert "You are talking with default, now at v0." in shown
    assert shown.count("default@v0") == 2
    first, second = server.exchanges()
    assert first.content.reply in shown
    assert (first.turn, second.turn) == (0, 1)
    assert [message.role for message in second.content.messages] == ["user", "assistant", "user"]
    assert first.content.user == "ann"


def test_what_is_typed_after_a_reply_rates_it(server: Served, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    shown = talk(server, screen, "hello", "+", "-", "4", "/fix better words", "/quit", "never", monkeypatch=monkeypatch)
    assert shown.count("Noted. Thank you.") == 4
    [exchange] = server.exchanges()
    said = [(event.kind, event.value, event.content.text) for event in server.said() if event.type == "feedback"]
    assert said == [
        ("thumb", 1.0, None),
        ("thumb", 0.0, None),
        ("rating", 4.0, None),
        ("correction", None, "better words"),
    ]
    assert all(event.reply_ids == (exchange.id,) for event in server.said() if event.type == "feedback")


def test_a_refusal_is_told_and_the_conversation_goes_on(
    server: Served, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    shown = talk(server, screen, "+", "hello " * 5000, "hello", monkeypatch=monkeypatch)
    assert "There is no reply to rate yet." in shown
    assert "tokens" in shown
    assert len(server.exchanges()) == 1


def test_another_conversation_begins_when_asked(server: Served, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    talk(server, screen, "hello", "/new", "hello", "/help", "/policy", monkeypatch=monkeypatch)
    first, second = server.exchanges()
    assert first.conversation != second.conversation
    assert '"current": "v0"' in screen.getvalue()
    assert "thumb up or down" in screen.getvalue()


def test_nobody_there_is_said_in_a_line():
    with pytest.raises(Refused, match=r"cannot be reached .* Is `heed up` running\?"):
        chat("http://127.0.0.1:9", "ann", "default", Console(file=io.StringIO()))


def test_simulated_people_rate_a_real_server_in_every_kind(server: Served):
    plan = Plan(server.url, exchanges=12, raters=3, at_once=4, wait_s=0, taste="long")
    tally = Tally()
    kinds = ["thumb", "rating", "preference", "correction"]
    asyncio.run(simulate(plan, cast_of(plan), ["hello", "what is this"], kinds, tally))
    assert tally.exchanges == 12
    assert len(server.exchanges()) == 15  # a preference takes two replies
    assert len(server.said()) == sum(tally.feedback.values())
    assert tally.feedback["thumb"] == tally.feedback["rating"] == 3
    assert json.dumps(tally.summary(plan))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(f"[web]\nsha256 = '{hashlib.sha256(b'the-key').hexdigest()}'\nquota = 120\n")
    return path


def test_where_a_key_is_needed_chat_and_simulate_bring_it_or_say_so(
    serve_with: Callable[..., Served], keys: Path, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    server = serve_with(api_keys_file=keys)
    for wrong in (None, "another"):
        with pytest.raises(Refused, match=r"API key.* Name it with --key or HEED_API_KEY\."):
            chat(server.url, "ann", "default", Console(file=screen), wrong)
        plan = Plan(server.url, key=wrong, exchanges=2, raters=1, wait_s=0)
        with pytest.raises(Refused, match="HEED_API_KEY"):
            asyncio.run(simulate(plan, cast_of(plan), ["hello"], ["thumb"], Tally()))
        assert "another" not in repr(plan)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n+\n"))
    chat(server.url, "ann", "default", Console(file=screen), "the-key")
    plan = Plan(server.url, key="the-key", exchanges=2, raters=1, wait_s=0)
    asyncio.run(simulate(plan, cast_of(plan), ["hello"], ["rating"], Tally()))
    assert [said.kind for said in server.said() if isinstance(said, Feedback)] == ["thumb", "rating", "rating"]


def test_the_key_comes_from_the_flag_or_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEED_API_KEY", raising=False)
    assert address_and_key("far.example:1", None) == ("http://far.example:1", None)
    monkeypatch.setenv("HEED_API_KEY", "from-the-environment")
    assert address_and_key("https://far.example", None) == ("https://far.example", "from-the-environment")
    assert address_and_key("far.example", "from-the-flag") == ("http://far.example", "from-the-flag")
    with pytest.raises(SettingError, match=r"^--api-key=\(hidden\): must be") as refused:
        address_and_key("far.example", "two words")
    assert "two words" not in str(refused.value)


def test_a_reply_cannot_play_with_the_terminal():
    assert harmless("a\x1b]0;title\x07b\x9b2Jc\r\n\td 🙂") == "a]0;titleb2Jc\n\td 🙂"
