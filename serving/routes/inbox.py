"""What other threads have to say, brought into the event loop: with one wake-up for many, not one for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 1.0
"""Between two looks at whose time is up: a timer for each who waits would cost as much as the waiting."""


class Inbox:
    """Waits in one event loop for futures that other threads resolve."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._called = False
        self._looking = False
        self._waiting: dict[asyncio.Future[Any], float] = {}
        """Until when (the loop's time) each waits."""

    async def answer(self, future: Future[T], at_most_s: float) -> T:
        """The future's result, or what it raises. Raises TimeoutError, a second late at most; never cancels the future."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        if not self._looking:
            self._looking = True
            loop.call_later(LOOK_S, self._look, loop)
        self._waiting[waiter] = loop.time() + at_most_s
        future.add_done_callback(partial(self._arrive, loop, waiter))
        try:
            return await waiter
        finally:
            del self._waiting[waiter]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        for waiter, until in self._waiting.items():
            if until < loop.time() and not waiter.done():
                waiter.set_exception(TimeoutError())
        self._looking = bool(self._waiting)
        if self._looking:
            loop.call_later(LOOK_S, self._look, loop)

    def _arrive(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[T], future: Future[T]) -> None:
        """Called in any thread."""
        self._arrived.append((waiter, future))
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._called = False  # first: what arrives from here on calls again
        while self._arrived:
            waiter, future = self._arrived.popleft()
            if waiter.done():
                continue
            error = future.exception()
            if error is None:
                waiter.set_result(future.result())
            else:
                waiter.set_exception(error)
