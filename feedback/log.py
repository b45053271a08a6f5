"""The log: what happened, in order, kept before anyone is told it was kept.

A topic is one partition or several; events of one key lie in one partition, in the order in which they were handed in.
Readers keep their own offsets, beside the state they make of what they read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from feedback.config import FeedbackConfig
from feedback.keeping import Keep

Offset = int
"""Position of a record in its partition; the first is 1, and they grow."""

Offsets = Mapping[str, Offset]
"""Partition → an offset of it; a partition that is absent counts as not begun."""


class LogUnavailable(Exception):
    """The log cannot be used now, e.g. because the disk is full: the event was not kept, and may be given again."""


class EventTooLarge(LogUnavailable):
    """The log takes no event of this size, now or later."""


@dataclass(frozen=True, slots=True)
class Record:
    """One event as it lies in the log; `event` is its JSON, see feedback.events.parse_event."""

    topic: str
    partition: str
    """Its name, which no other topic's partition has: `heed.feedback`, or `heed.feedback/3` where there are several."""
    offset: Offset
    key: str
    event: str


class Line(Protocol):
    """A way to hand events to a log."""

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        """Hand in an event (JSON); the future gives its offset once it is durable, or raises LogUnavailable.

        Events of a key handed in by one thread are kept in that order. The future cannot be cancelled: what was
        handed in is kept even when nobody waits for it any more. Raises ValueError where this log does not write
        `topic`, LogUnavailable where it is closed.
        """
        ...


class Log(Line, Protocol):
    """Append and read. Safe to use from many threads at once."""

    def line(self) -> Line:
        """A line on which no event of a key overtakes one that failed: once one has, all that are handed in on it fail.

        An event that failed may have been kept all the same, so whoever hands it in again needs the order of the rest.
        """
        ...

    def append(self, topic: str, key: str, event: str) -> Offset:
        """Keep an event and give its offset; returns only when it is durable. Raises LogUnavailable, ValueError."""
        ...

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        """At most `max_events` records that follow the offsets `after`, each partition's in order; fewer may come.

        Empty at the end, where nothing was ever written, and while the log cannot be reached for now.
        Raises LogUnavailable where waiting will not help, e.g. when the file is damaged.
        """
        ...

    def end(self, topic: str) -> Offsets:
        """The last offset of each partition, 0 of an empty one; nothing while the topic is away, or was never written.

        Raises LogUnavailable as `read` does.
        """
        ...

    def away(self) -> bool:
        """Whether nobody answered the last `read` or `end`: what they gave then says nothing of what is there."""
        ...

    def waiting(self) -> int:
        """How many events wait in this process's outbox for a log that is away."""
        ...

    def close(self) -> None:
        """Keep what was handed in, then let go of everything. A second call does nothing."""
        ...


def open_log(config: FeedbackConfig, *, writes: Collection[str], outbox: bool = False) -> Log:
    """The log of these settings, in the role of a process that writes the topics `writes`.

    With `outbox`, what Kafka does not take in time waits in the data folder, and follows later. Kafka need not be there.
    Raises LogUnavailable where another process writes the same files already, or the disk refuses.
    """
    # each implementation is imported only where it is chosen
    if config.kafka.kafka_bootstrap:
        from feedback.kafka_log import KafkaLog
        from feedback.outbox import Outbox

        log = KafkaLog(config, writes)
        return Outbox(log, config.data / "outbox", writes, config.outbox_mb * 1_000_000) if outbox else log
    from feedback.sqlite_log import SqliteLog

    return SqliteLog(config.data / "log", writes, Keep.of(config.log_keep_days, config.log_keep_mb))
