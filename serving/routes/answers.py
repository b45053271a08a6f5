"""OpenAI's shapes of a chat's answer: one JSON body, or chunks as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.chat import Chat
from serving.engine import Finished, Token
from serving.routes.completion import Completion, Ended, failure_of
from serving.routes.logprobs import entries

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
_SOME_TEXT = "\ue000"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LINE_ENDS = [("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")]
"""Escaped in events: no line ends to JSON or to an event stream, but to clients that split by Unicode (httpx)."""


async def whole(completion: Completion, chat: Chat, *, logprobs: bool) -> Json:
    """The answer in one piece. Raises ServerFailed."""
    said: list[list[Json]] = [[] for _ in range(completion.asked.choices)]
    ended: dict[int, Ended] = {}
    async for events in completion.events():
        for choice, event in events:
            if isinstance(event, Ended):
                ended[choice] = event
            elif logprobs:
                said[choice] += entries(chat, event)
    for end in ended.values():
        if end.finished.reason == "error" and (failure := failure_of(end.finished)):
            raise failure
    choices = [
        {
            "index": choice,
            "message": {"role": "assistant", "content": end.finished.text, "refusal": None},
            "logprobs": {"content": said[choice], "refusal": None} if logprobs else None,
            "finish_reason": _reason(end.finished),
        }
        for choice, end in sorted(ended.items())
    ]
    kept = all(end.kept for end in ended.values())
    usage = _usage(completion, [end.finished for end in ended.values()])
    return _head(completion, "chat.completion") | {"choices": choices, "usage": usage, "heed": _heed(completion, kept)}


async def chunks(completion: Completion, chat: Chat, *, logprobs: bool, usage: bool) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, in one piece where several have come at once."""
    head = _head(completion, "chat.completion.chunk") | ({"usage": None} if usage else {})
    choices = [_ChunkedChoice(number, head, chat, logprobs=logprobs) for number in range(completion.asked.choices)]
    finished: list[Finished] = []
    async for events in completion.events():
        told: list[bytes] = []
        for number, event in events:
            if isinstance(event, Token):
                told.append(choices[number].token(event))
            elif event.finished.reason == "error" and (failure := failure_of(event.finished)):
                told.append(_event(failure.body()))
            else:
                finished.append(event.finished)
                told.append(choices[number].end(event.finished, _heed(completion, event.kept)))
        yield b"".join(told)
    if usage:
        yield _event(head | {"choices": [], "usage": _usage(completion, finished)})
    yield DONE


class _ChunkedChoice:
    """One reply, in chunks, each an event."""

    def __init__(self, number: int, head: Json, chat: Chat, *, logprobs: bool) -> None:
        """`head`: what all chunks of the answer have."""
        self._number = number
        self._head = head
        self._chat = chat
        self._wants_logprobs = logprobs
        self._logprobs: list[Json] = []
        """Of tokens whose text was not sent yet."""
        self._given = 0
        """Characters of the reply that were sent."""
        self._begun = False
        # nearly every chunk is this one with another text, and a server may send thousands a second
        self._before, self._after = self._chunk({"content": _SOME_TEXT}).split(_json(_SOME_TEXT))

    def token(self, token: Token) -> bytes:
        """The chunks of one token: none while its text is not certain yet."""
        if self._wants_logprobs:
            self._logprobs += entries(self._chat, token)
        return self._beginning() + self._text(token.text)

    def end(self, finished: Finished, heed: Json) -> bytes:
        """The last chunks: text that was still held back, then the reason."""
        text = self._beginning() + self._text(finished.text[self._given :])
        return text + self._chunk({}, finish_reason=_reason(finished), heed=heed)

    def _beginning(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        choice = {"index": self._number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _event(self._head | {"choices": [choice]})

    def _text(self, text: str) -> bytes:
        self._given += len(text)
        if not text:
            return b""
        return self._chunk({"content": text}) if self._logprobs else self._before + _json(text) + self._after

    def _chunk(self, delta: Json, finish_reason: str | None = None, **more: Json) -> bytes:
        told, self._logprobs = self._logprobs, []
        logprobs = {"content": told, "refusal": None} if told else None
        choice = {"index": self._number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event(self._head | {"choices": [choice]} | more)


class EventStream(Response):
    """Server-sent events. The route watches for the client's leaving: nothing here reads the request."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        # x-accel-buffering: a proxy that collects the answer before passing it on makes no stream
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # nobody knows it yet
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _head(completion: Completion, kind: str) -> Json:
    return {
        "id": completion.asked.id,
        "object": kind,
        "created": int(completion.asked.created),
        "model": completion.model,
        "system_fingerprint": completion.fingerprint,
    }


def _heed(completion: Completion, kept: bool) -> Json:
    """What OpenAI's answer does not have."""
    asked = completion.asked
    return {
        "version": f"v{completion.version}",
        "kept": kept,
        "ask": asked.ask and kept,
        "conversation": asked.place.conversation,
        "turn": asked.place.turn,
    }


def _usage(completion: Completion, finished: Sequence[Finished]) -> Json:
    prompt, reply = len(completion.asked.prompt_ids), sum(len(end.reply_ids) for end in finished)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def _reason(finished: Finished) -> str:
    """OpenAI knows no `abort`: to a client, a reply cut off at its deadline reached a limit."""
    return "length" if finished.reason == "abort" else finished.reason


def _event(body: Json) -> bytes:
    return b"data: " + _json(body) + b"\n\n"


def _json(body: Json | str) -> bytes:
    text = _encode(body)
    if not text.isascii():
        for end, escaped in _LINE_ENDS:
            text = text.replace(end, escaped)
    return text.encode()
