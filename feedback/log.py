"""The log: what happened, in order, kept before anyone is told it was kept.

A topic has one writing process and any number of readers. Readers keep their own offsets, beside the state they make of
what they read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from feedback.config import FeedbackConfig

Offset = int
"""Position of a record in its topic; the first is 1, and they grow by 1."""

Offsets = Mapping[str, Offset]
"""Topic → last offset read."""


class LogUnavailable(Exception):
    """The log cannot be used now, e.g. because the disk is full: the event was not kept, and may be given again."""


@dataclass(frozen=True, slots=True)
class Record:
    """One event as it lies in the log; `event` is its JSON, see feedback.events.parse_event."""

    topic: str
    offset: Offset
    key: str
    event: str


class Log(Protocol):
    """Append and read. Safe to use from many threads at once."""

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        """Hand in an event (JSON); the future gives its offset once it is durable, or raises LogUnavailable.

        Events of a topic handed in by one thread are kept in that order. The future cannot be cancelled: what was
        handed in is kept even when nobody waits for it any more. Raises ValueError where this log does not write
        `topic`, LogUnavailable where it is closed.
        """
        ...

    def append(self, topic: str, key: str, event: str) -> Offset:
        """Keep an event and give its offset; returns only when it is durable. Raises LogUnavailable, ValueError."""
        ...

    def read(self, topic: str, after: Offset, max_events: int) -> list[Record]:
        """At most `max_events` records that follow offset `after` (0: from the first), in order.

        Empty at the end, where nothing was ever written, and while the log cannot be reached for now.
        Raises LogUnavailable where waiting will not help, e.g. when the file is damaged.
        """
        ...

    def end(self, topic: str) -> Offset:
        """The last offset of a topic, 0 where it is empty or away for now. Raises LogUnavailable as `read` does."""
        ...

    def close(self) -> None:
        """Keep what was handed in, then let go of everything. A second call does nothing."""
        ...


def open_log(config: FeedbackConfig, *, writes: Collection[str]) -> Log:
    """The log of these settings, in the role of the one process that writes the topics `writes`.

    Raises LogUnavailable where another process writes one of them already, or the disk refuses.
    """
    from feedback.sqlite_log import SqliteLog  # the one implementation so far; another is imported only when chosen

    return SqliteLog(config.data / "log", writes)
