"""What other threads have to say, brought into the event loop: with one wake-up for many, not one for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Inbox:
    """Waits in one event loop for futures that other threads resolve."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._called = False

    async def answer(self, future: Future[T], at_most_s: float) -> T:
        """The future's result, or what it raises. Raises TimeoutError; the future itself is never cancelled."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(partial(self._arrive, loop, waiter))
        async with asyncio.timeout(at_most_s):
            return await waiter

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
