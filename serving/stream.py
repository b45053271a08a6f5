"""A request to the engine, what comes back, and the stream between: written by the engine's thread, read anywhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from serving.sampling import Sampling

Reason = Literal["stop", "length", "abort", "error"]
"""stop: end of sequence or stop text; length: max_tokens or the model's length; abort: cancelled or too late."""


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to be made."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    version: int | None = None
    """The adapter version to speak; None for the one that is current when the request is admitted."""
    caller: str = ""
    """Callers take turns in the line."""
    deadline: float | None = None
    """time.monotonic() after which the reply is aborted; None for never."""


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token."""

    id: int
    text: str
    """Text that became certain with this token: often its own, sometimes none yet, sometimes that of several."""
    logprob: float
    """Under the distribution it was drawn from."""
    raw_logprob: float
    """At temperature 1 under the full softmax."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place with their raw log-probs, as many as asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole reply, or as much as there is of it; the last event of every stream."""

    reason: Reason
    version: int
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    """All sampled ids: also the end-of-sequence id and those of a stop text, which `text` leaves out."""
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    text: str
    error: str | None = None
    """For abort and error: why, in a sentence."""


Event = Token | Finished
Reader = tuple[asyncio.AbstractEventLoop, Callable[[], object]]


class Stream:
    """The events of one reply: `listen` and `take` in asyncio, `result()` in a thread, or `on_event` given to `submit`."""

    def __init__(
        self, request: Request, on_event: Callable[[Event], None] | None, tokens: bool, drive: Callable[[], bool]
    ) -> None:
        """`tokens`: False when only the end is wanted. `drive`: makes a step; False when a thread makes them."""
        self.request = request
        self.tokens = tokens
        self.version: int | None = None
        """The version that speaks: known at admission."""
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        """When the reply left the line and its version was bound (time.monotonic())."""
        self.finished: Finished | None = None
        self.cancelled = False
        self._on_event = on_event
        self._drive = drive
        self._done = threading.Event()
        self._events: deque[Event] = deque()
        self._reader: Reader | None = None

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the whole reply. Raises TimeoutError after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._done.is_set() and (until is None or time.monotonic() < until) and self._drive():
            pass
        if not self._done.wait(None if until is None else max(0.0, until - time.monotonic())):
            raise TimeoutError(f"no whole reply within {timeout} s")
        assert self.finished is not None
        return self.finished

    def listen(self, told: Callable[[], object]) -> None:
        """Have `told` called in the running loop whenever there are events to `take`."""
        loop = asyncio.get_running_loop()
        self._reader = (loop, told)
        loop.call_soon(told)  # some may have come already

    def take(self) -> Event | None:
        """The next event, Token after Token, then Finished; None when no more has come yet."""
        event = self._events.popleft() if self._events else None
        if isinstance(event, Finished):
            self._reader = (
                None  # whoever listened most likely holds the stream, too: nothing is to wait for a collection
            )
        return event

    def deliver(self, event: Event) -> Reader | None:
        """Called by the engine with each event in order; returns the reader to wake, if there is one.

        What `on_event` raises, rises.
        """
        if isinstance(event, Finished):
            self.finished = event
        try:
            if self._on_event is not None:
                self._on_event(event)
            else:
                self._events.append(event)
        finally:
            if isinstance(event, Finished):
                self._done.set()
        return self._reader


def wake(readers: Iterable[Reader]) -> None:
    """Tell each reader that events have arrived: one call a loop, whatever the number of its readers."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], object]]] = {}
    for loop, told in readers:
        by_loop.setdefault(loop, []).append(told)
    for loop, all_told in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed: nobody reads there any more
            loop.call_soon_threadsafe(_tell, loop, all_told)


def _tell(loop: asyncio.AbstractEventLoop, all_told: list[Callable[[], object]]) -> None:
    for told in all_told:
        try:
            told()
        except Exception as error:  # one reader's fault must not keep the others waiting
            loop.call_exception_handler({"message": "a reader of replies failed", "exception": error})
