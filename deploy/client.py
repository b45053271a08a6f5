"""A small client of Heed's HTTP API, for the parts that talk to a server as its users do.

It waits as long as the server asks when it is busy (429, 503), for a bounded time, and turns every other refusal into
one `Refused` with the server's own words.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

BUSY = frozenset({429, 503})
Json = dict[str, Any]


class Refused(Exception):
    """The server said no, or could not be reached; the message is fit for people."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice of a completion, as its client knows it."""

    id: str
    prompt: str
    text: str
    model: str
    """The version that spoke, `default@v3`, or the base's name."""
    tokens: int | None = None
    """Tokens of the reply; known only where one choice was asked for."""

    @property
    def version(self) -> int:
        """The number in `default@v3`; 0 for the base."""
        _, _, version = self.model.partition("@v")
        return int(version) if version.isdecimal() else 0


class Client:
    """Asynchronous, with one connection pool; use it in `async with`."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience_s: float = 120.0,
        absence_s: float = 20.0,
        timeout_s: float = 300.0,
    ) -> None:
        """`key`: the API key, where the server wants one.

        In seconds: `patience_s`, how long a busy server is asked again; `absence_s`, how long one that was there may be
        away, as it is when it restarts; `timeout_s`, for one answer.
        """
        self.url = url.rstrip("/")
        self.patience_s, self.absence_s = patience_s, absence_s
        self._met = False
        # A proxy that is set for the world outside must not catch what stays on this machine.
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=bearing(key), timeout=timeout_s, trust_env=not is_local(self.url)
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(
        self, prompt: str, *, user: str | None = None, model: str = "default", n: int = 1, **sampling: object
    ) -> list[Reply]:
        """Sends one user message; returns `n` replies. `sampling` goes into the request: temperature, seed …"""
        body: Json = {"model": model, "messages": [{"role": "user", "content": prompt}], "n": n, **sampling}
        if user is not None:
            body["user"] = user
        answer = await self.post("/v1/chat/completions", body)
        tokens = answer.get("usage", {}).get("completion_tokens") if n == 1 else None
        return [
            Reply(
                id=answer["id"] if choice["index"] == 0 else f"{answer['id']}:{choice['index']}",
                prompt=prompt,
                text=choice["message"]["content"] or "",
                model=answer["model"],
                tokens=tokens,
            )
            for choice in answer["choices"]
        ]

    async def rate(self, body: Mapping[str, object]) -> str:
        """Sends one piece of feedback; returns its receipt's id."""
        receipt: str = (await self.post("/v1/feedback", dict(body)))["id"]
        return receipt

    async def policy(self) -> Json:
        return await self.get("/v1/policy")

    async def get(self, path: str) -> Json:
        return await self._send("GET", path, None)

    async def post(self, path: str, body: Json) -> Json:
        return await self._send("POST", path, body)

    async def _send(self, method: str, path: str, body: Json | None) -> Json:
        started = time.monotonic()
        while True:
            try:
                answer = await self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{self.url} cannot be reached ({error or type(error).__name__}). Is `heed up` running?"
                pause, longest = 0.5, self.absence_s if self._met else 0.0
            else:
                self._met = True
                if answer.is_success:
                    content: Json = answer.json()
                    return content
                problem = f"{method} {path}: {answer.status_code} {complaint(answer)}"
                pause, longest = retry_after(answer), self.patience_s if answer.status_code in BUSY else 0.0
            # Some chance in the pause, so that those who were refused together do not come back together.
            pause *= random.uniform(1.0, 1.5)
            if time.monotonic() + pause > started + longest:
                raise Refused(problem)
            await asyncio.sleep(pause)


def retry_after(answer: httpx.Response, longest_s: float = 10.0) -> float:
    """Seconds that a refusal asks to wait; at least 0.1, at most `longest_s`, 0.5 where it names none."""
    named = answer.headers.get("retry-after", "")
    return min(longest_s, max(0.1, float(named))) if named.isdecimal() else 0.5


def bearing(key: str | None) -> dict[str, str]:
    """The headers that carry an API key."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def complaint(answer: httpx.Response) -> str:
    """What an error body says (OpenAI's shape), else the start of whatever came."""
    hint = " Name it with --key or HEED_API_KEY." if answer.status_code == 401 else ""
    try:
        return str(answer.json()["error"]["message"]) + hint
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def is_local(url: str) -> bool:
    """True when the address is this machine's loopback."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
