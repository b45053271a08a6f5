"""Short jobs on one thread, asked for from event loops, many at a time: a hop for each would cost more than the job."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar, overload

T = TypeVar("T")
S = TypeVar("S")

GATHER_S = 0.002
"""Where several came together, the next are let gather so long."""
MOST = 500
"""Jobs of one round: bounds how long the first of them waits for its answer."""


class _Asked(NamedTuple):
    job: Any
    waiter: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class Jobs:
    """Does what it is asked in the order in which it is asked. What is written in a row is written at once.

    A job is something to call, for its result, or a sequence to be written, for the result of the writing.
    """

    def __init__(self, write: Callable[[Sequence[Any]], Any]) -> None:
        """`write` takes everything that came in a row. Where it raises, each part is tried by itself."""
        self._write = write
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._crowded = False

    @overload
    async def do(self, job: Callable[[], T]) -> T: ...
    @overload
    async def do(self, job: Sequence[S]) -> object: ...
    async def do(self, job: Any) -> Any:
        """The job's result, or what it raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heed-board", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        self._asked.put(_Asked(job, waiter, loop))
        return await waiter

    async def end(self) -> None:
        """Do what was asked, and end the thread; another job would begin a new one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._asked.put(None)
            await asyncio.to_thread(thread.join)

    def _run(self) -> None:
        more = True
        while more:
            round_, more = self._next()
            self._crowded = len(round_) > 1
            answers: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any, BaseException | None]]]
            answers = defaultdict(list)
            for asked, result, error in self._done(round_):
                answers[asked.loop].append((asked.waiter, result, error))
            for loop, told in answers.items():
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(_tell, told)

    def _next(self) -> tuple[list[_Asked], bool]:
        """What is asked by now (waits for the first), and whether more may follow."""
        asked = self._asked.get()
        if self._crowded:
            time.sleep(GATHER_S)
        round_: list[_Asked] = []
        while asked is not None:
            round_.append(asked)
            if len(round_) == MOST:
                return round_, True
            try:
                asked = self._asked.get_nowait()
            except Empty:
                return round_, True
        return round_, False

    def _done(self, round_: Sequence[_Asked]) -> list[tuple[_Asked, Any, BaseException | None]]:
        done, row = list[tuple[_Asked, Any, BaseException | None]](), list[_Asked]()
        for asked in round_:
            if callable(asked.job):
                done += self._written(row)
                row = []
                done.append((asked, *_tried(asked.job)))
            else:
                row.append(asked)
        return done + self._written(row)

    def _written(self, row: Sequence[_Asked]) -> list[tuple[_Asked, Any, BaseException | None]]:
        if not row:
            return []
        result, error = _tried(lambda: self._write([part for asked in row for part in asked.job]))
        if error is not None and len(row) > 1:
            return [told for asked in row for told in self._written([asked])]
        return [(asked, result, error) for asked in row]


def _tried(job: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return job(), None
    except Exception as error:  # it is the asker's
        return None, error


def _tell(told: Sequence[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for waiter, result, error in told:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(result)
        else:
            waiter.set_exception(error)
