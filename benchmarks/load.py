"""A small streaming client: so many talkers at once, each asking again as soon as its answer is whole.

It shares the server's cores, so it does little: one connection a request, and a look at the clock whenever bytes come.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Json = dict[str, Any]
_EVENT = b"data: {"
_ENOUGH_S = 600.0


@dataclass(slots=True)
class Answer:
    """One streamed answer, by the clock (time.perf_counter())."""

    asked: float
    at: list[float] = field(default_factory=list)
    """When each event came."""
    last: bytes = b""
    """The last event but `[DONE]`, as it came."""

    @property
    def first_token(self) -> float:
        return self.at[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Between events, but the last two, which say that it has ended."""
        told = self.at[:-2]
        return [after - before for before, after in pairwise(told)]


async def ask(port: int, path: str, body: Json) -> Answer:
    """POST one request and read its events to the end. Raises RuntimeError for another status than 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    answer = Answer(time.perf_counter())
    try:
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status[:20]:
            raise RuntimeError(f"{path}: {status.splitlines()[0]!r} {await reader.read(2000)!r}")
        said = b""
        while piece := await reader.read(2**16):
            now = time.perf_counter()
            answer.at += [now] * (said[1 - len(_EVENT) :] + piece).count(_EVENT)
            said = (said + piece)[-4096:]
        events = [line for line in said.split(b"\n") if line.startswith(b"data: {")]
        answer.last = events[-1].removeprefix(b"data: ")
    finally:
        writer.close()
    return answer


def talk(port: int, path: str, bodies: Sequence[Json], at_once: int) -> tuple[list[Answer], float]:
    """All these requests, `at_once` at a time; the answers, and the seconds it took."""
    return asyncio.run(_talk(lambda body: ask(port, path, body), bodies, at_once))


async def _talk(ask_one: Callable[[Json], Any], bodies: Sequence[Json], at_once: int) -> tuple[list[Answer], float]:
    left = iter(bodies)
    answers: list[Answer] = []
    gc.freeze()  # a full collection of what was imported takes longer than any gap

    async def talker() -> None:
        for body in left:
            answers.append(await asyncio.wait_for(ask_one(body), _ENOUGH_S))

    begin = time.perf_counter()
    await asyncio.gather(*(talker() for _ in range(at_once)))
    return answers, time.perf_counter() - begin


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
