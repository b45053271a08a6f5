"""`heed chat`: talk with the policy in the terminal, and rate what it says."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from deploy.client import Refused, bearing, complaint, is_local

HELP = """\
[b]+[/b] or [b]-[/b]      thumb up or down for the last reply      [b]1[/b] … [b]5[/b]  stars for it
[b]/fix TEXT[/b]    what it should have said                [b]/new[/b]    another conversation
[b]/policy[/b]      which version speaks, and why           [b]/quit[/b]   leave (Ctrl-D does too)"""


@dataclass
class Talk:
    """One person's conversation with a server. `base_url` without a path; errors are `Refused`."""

    http: httpx.Client
    user: str
    model: str = "default"
    messages: list[dict[str, str]] = field(default_factory=list)
    reply_id: str | None = None
    speaker: str = ""
    """The version that gave the last reply."""

    def say(self, text: str) -> Iterator[str]:
        """Sends a message; yields the reply in pieces, as they come."""
        messages = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "stream": True, "user": self.user}
        reply = ""
        for chunk in self._stream(body):
            self.reply_id, self.speaker = chunk["id"], chunk["model"]
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                reply += piece
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": reply}]

    def rate(self, **feedback: object) -> None:
        """Sends feedback on the last reply."""
        if self.reply_id is None:
            raise Refused("There is no reply to rate yet.")
        self._checked(self.http.post("/v1/feedback", json={**feedback, "reply_id": self.reply_id, "user": self.user}))

    def policy(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._checked(self.http.get("/v1/policy")).json()
        return answer

    def start_again(self) -> None:
        self.messages, self.reply_id = [], None

    def _stream(self, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if not answer.is_success:
                answer.read()
            for line in self._checked(answer).iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Refused(str(event["error"]["message"]))
                    yield event

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if not answer.is_success:
            raise Refused(complaint(answer))
        return answer


def chat(url: str, user: str, model: str, console: Console, key: str | None = None) -> None:
    """Reads lines until Ctrl-D or /quit. A refusal is shown and the conversation goes on; raises Refused at the start
    when no server answers."""
    with httpx.Client(base_url=url, headers=bearing(key), timeout=300, trust_env=not is_local(url)) as http:
        talk = Talk(http, user, model)
        try:
            current = talk.policy()["current"] or "v0"
        except httpx.TransportError as error:
            raise Refused(f"{url} cannot be reached ({error}). Is `heed up` running?") from error
        console.print(
            f"You are talking with [b]{model}[/b], now at [b]{current}[/b]. [b]/help[/b] says what else you can do."
        )
        while (line := read_line(console)) is not None:
            try:
                if not obey(line, talk, console):
                    return
            except Refused as error:
                console.print(f"[red]{escape(str(error))}[/red]")
            except httpx.TransportError as error:
                console.print(f"[red]The server went away ({escape(str(error))}). Try again when it is back.[/red]")


def read_line(console: Console) -> str | None:
    """The next line, None at the end of input or at Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  its import gives input() arrow keys and history
    try:
        return console.input("[cyan]you>[/cyan] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def obey(line: str, talk: Talk, console: Console) -> bool:
    """Does what one line asks for; False when it asks to leave."""
    command, _, rest = line.partition(" ")
    if line in ("+", "-"):
        talk.rate(kind="thumb", value="up" if line == "+" else "down")
        console.print("[dim]Noted. Thank you.[/dim]")
    elif line in ("1", "2", "3", "4", "5"):
        talk.rate(kind="rating", value=int(line))
        console.print("[dim]Noted. Thank you.[/dim]")
    elif command == "/fix" and rest:
        talk.rate(kind="correction", text=rest)
        console.print("[dim]Noted. Thank you.[/dim]")
    elif command == "/new":
        talk.start_again()
    elif command == "/policy":
        console.print_json(data=talk.policy())
    elif command == "/quit":
        return False
    elif line.startswith("/"):
        console.print(HELP)
    elif line:
        answer(line, talk, console)
    return True


def answer(line: str, talk: Talk, console: Console) -> None:
    """Prints the reply as it comes, then who spoke."""
    for piece in talk.say(line):
        console.print(harmless(piece), end="", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[dim]{escape(talk.speaker)}   + or - to rate[/dim]")


def harmless(text: str) -> str:
    """Text without control characters but line feeds and tabs: a reply must not play with the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
