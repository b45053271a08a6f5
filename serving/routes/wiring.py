"""What routes are given, by name: the parts a server is made of, and who is asking."""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Header, Request

from feedback.board import Board
from feedback.events import Feedback, Release
from feedback.log import Log
from feedback.outbox import WAITS
from serving.adapters import AdapterStore, ReleaseBroken
from serving.config import ServingConfig
from serving.errors import OverQuota, Unavailable
from serving.ids import Ids
from serving.keys import Keys, bearer
from serving.metrics import Metrics
from serving.routes.inbox import Inbox
from serving.schemas import Said

if TYPE_CHECKING:
    from serving.backend import Backend
    from serving.base import Base
    from serving.chat import Chat
    from serving.swap import Swapper
    from serving.traces import Traces

DROPPED = 4096


@dataclass(frozen=True, slots=True)
class Speaker:
    """What answers chats: there once the model is loaded."""

    engine: Backend
    chat: Chat
    base: Base
    swapper: Swapper
    folder: Path
    """Where the base model's files lie."""


@dataclass(slots=True)
class Wiring:
    """The parts of one server, put together by create_app. Nothing of it is global."""

    config: ServingConfig
    ids: Ids
    log: Log
    board: Board
    store: AdapterStore
    metrics: Metrics
    base_name: str
    """The base model, as clients name it."""
    loop: asyncio.AbstractEventLoop | None = None
    """That in which the server runs; set before a speaker is made."""
    keys: Keys | None = None
    """None: nobody needs one."""
    traces: Traces | None = None
    """None: nothing is traced."""
    speaker: Speaker | None = None
    """None while the model is loading."""
    draining: bool = False
    """True from the first SIGTERM on: new chats are still answered, but nobody should send more."""
    inbox: Inbox = field(default_factory=Inbox)
    """How the log's answers come."""
    accepting: dict[str, tuple[str, asyncio.Task[bool]]] = field(default_factory=dict)
    """Feedback ids on their way into the log, with the digest of their body: two posts at once make one event."""
    unshown: list[tuple[Said, Feedback]] = field(default_factory=list)
    """Feedback that the log has kept, and the board is to be told of."""
    showing: asyncio.Task[None] | None = None
    """Tells the board of it."""
    hinted: float = 0.0
    """When the learner was last told of feedback (time.monotonic())."""
    dropped: deque[str] = field(default_factory=lambda: deque(maxlen=DROPPED))
    """The last replies that were to be kept and could not be: feedback on them is refused, as their answer said."""
    started: float = field(default_factory=time.time)
    dice: random.Random = field(default_factory=random.SystemRandom)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Work that goes on when the request that began it is gone, such as keeping what was said."""

    @property
    def ready(self) -> bool:
        """True when a chat sent now would be answered, and a next one too."""
        return self.speaker is not None and not self.draining

    async def append(self, topic: str, key: str, event: str, at_most_s: float) -> None:
        """Return once the log has kept the event. Raises LogUnavailable, TimeoutError after `at_most_s`."""
        with nullcontext() if self.traces is None else self.traces.append(topic) as span:
            offset = await self.inbox.answer(self.log.submit(topic, key, event), at_most_s)
            if span is not None:
                span.set_attribute("heed.outbox", offset == WAITS)

    def go_on(self, work: Coroutine[None, None, None], context: Context | None = None) -> asyncio.Task[None]:
        """Run `work` to its end whatever becomes of the request. `context`: of another request than runs now, or of none."""
        task = asyncio.get_running_loop().create_task(work, context=context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def go_on_in_loop(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """`go_on`, for other threads than the server's; waits for nothing. Raises RuntimeError once the server is gone."""
        if self.loop is None:
            raise RuntimeError("the server has not begun")
        self.loop.call_soon_threadsafe(lambda: self.go_on(work()))

    async def settle(self) -> None:
        """Wait for everything that goes on."""
        while self.tasks:
            await asyncio.wait(self.tasks)

    def release(self) -> Release:
        """What the release file says; while nobody can read it, that the base is served."""
        try:
            return self.store.release()
        except ReleaseBroken:
            return Release(policy=self.store.policy)


@dataclass(frozen=True, slots=True)
class Client:
    """Who is asking."""

    key: str
    """The name of the API key; "" for everyone while there are none."""
    address: str
    quota: int | None = None
    """Chats and feedback a minute; None: no limit."""

    def caller(self, user: str | None) -> str:
        """Who takes turns in the queue and whose idempotency keys these are.

        A key's `user` if given, else the holder of the key, from wherever they call; without keys `user`, else the address.
        """
        if self.key:
            return f"key:{self.key}" if user is None else f"key:{self.key} user:{user}"
        return f"user:{user}" if user is not None else f"address:{self.address}"


# async, though they wait for nothing: FastAPI takes a thread for each call of one that is not


async def wiring_of(request: Request) -> Wiring:
    wiring = request.app.state.wiring
    assert isinstance(wiring, Wiring)
    return wiring


async def _speaker(wiring: Annotated[Wiring, Depends(wiring_of)]) -> Speaker:
    if wiring.speaker is None:
        raise Unavailable("The model is still being loaded; GET /ready says when it is there.", retry_after=1)
    return wiring.speaker


Parts = Annotated[Wiring, Depends(wiring_of)]
Speaking = Annotated[Speaker, Depends(_speaker)]
Authorization = Annotated[str, Header()]


async def client_of(request: Request, parts: Parts, authorization: Authorization = "") -> Client:
    """Raises UnknownKey where a key is needed and none of ours came. It must be asked before a body is read."""
    address = request.client.host if request.client else ""
    if parts.keys is None:
        return Client("", address)
    key = parts.keys.holder(authorization)
    return Client(key.name, address, key.quota)


Asking = Annotated[Client, Depends(client_of)]


async def operates(parts: Parts, authorization: Authorization = "") -> bool:
    """True where the admin token came with the request."""
    token, expected = bearer(authorization).encode(), (parts.config.admin_token or "").encode()
    return bool(expected) and hmac.compare_digest(token, expected)


async def reader_of(
    request: Request, parts: Parts, operating: Annotated[bool, Depends(operates)], authorization: Authorization = ""
) -> str | None:
    """The name of the key whose replies may be read; None for an operator, who may read all. Raises UnknownKey."""
    return None if operating else (await client_of(request, parts, authorization)).key


async def within_quota(client: Asking, parts: Parts) -> None:
    """Raises OverQuota where the key has sent what it may in a minute."""
    if client.quota is not None and (wait := await parts.board.take(client.key, client.quota)):
        raise OverQuota(client.quota, wait)
