"""The outbox: what a log that is away did not take waits on this machine's disk, and follows in order.

    submit ──▶ the log ──kept──▶ answered
                 │ not within its deadline
                 ▼
               the outbox ──on disk──▶ answered ──the log is back──▶ the log

Once an event waits, those behind it wait too, until none does: so the order stays. An event may come twice: where the
log kept it and could not say so any more, or the server was killed between the log's answer and its removal here. Those
who read the log know events by their ids.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple

from feedback.log import EventTooLarge, Line, Log, LogUnavailable, Offset, Offsets, Record
from feedback.sqlite_log import SqliteLog

logger = logging.getLogger(__name__)

BATCH = 100
"""Events brought to the log at a time: bounds the memory that large ones take."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
WAITS: Offset = 0
"""The offset of an event that has none in the log yet."""


class _Entry(NamedTuple):
    key: str
    event: str
    told: Future[Offset]

    @property
    def size(self) -> int:
        return len(self.key) + len(self.event)


class Outbox:
    """A log in front of a log: takes what that one cannot take now. Its `append` may give the offset 0: it waits."""

    def __init__(self, log: Log, folder: Path, writes: Collection[str], max_bytes: int) -> None:
        """`max_bytes` may wait for each topic. Raises LogUnavailable where another process has the folder."""
        self._log = log
        refused = [_refused(topic) for topic in writes]
        with contextlib.ExitStack() as opened:
            opened.callback(log.close)
            self._box = SqliteLog(folder, [*writes, *refused])
            opened.callback(self._box.close)
            self._lanes = {topic: _Lane(topic, log, self._box, max_bytes) for topic in writes}
            opened.pop_all()
        self._stop = threading.Event()
        self._drains = [
            threading.Thread(target=self._drain, args=(lane,), name=f"heed-outbox-{topic}", daemon=True)
            for topic, lane in self._lanes.items()
        ]
        for drain in self._drains:
            drain.start()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        if topic not in self._lanes:
            raise ValueError(f"this log was not opened to write {topic!r}: name it in `writes`")
        return self._lanes[topic].submit(key, event)

    def line(self) -> Line:
        return self  # it keeps the order whatever happens

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        return self._log.read(topic, after, max_events)

    def end(self, topic: str) -> Offsets:
        return self._log.end(topic)

    def away(self) -> bool:
        return self._log.away()

    def waiting(self) -> int:
        return sum(lane.waiting + lane.aside for lane in self._lanes.values())

    def close(self) -> None:
        self._stop.set()
        for lane in self._lanes.values():
            lane.wake()
        self._log.close()  # what it cannot keep any more comes back to the lanes, and into the box
        for drain in self._drains:
            drain.join()
        self._box.close()

    def _drain(self, lane: _Lane) -> None:
        """Bring to the log what waits, for as long as anything does."""
        wait_s = SHORTEST_WAIT_S
        while not self._stop.is_set():
            lane.more.wait()
            try:
                if not lane.drain():
                    self._stop.wait(SHORTEST_WAIT_S)  # what waits is not on disk yet
                wait_s = SHORTEST_WAIT_S
            except LogUnavailable:  # the log has said what is wrong with it
                self._stop.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)


class _Lane:
    """One topic's events: on their way to the log, or all of them waiting."""

    def __init__(self, topic: str, log: Log, box: SqliteLog, max_bytes: int) -> None:
        self._topic = topic
        self._log = log
        self._line = log.line()
        self._box = box
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._flying: dict[int, _Entry] = {}
        self._sent = 0
        self.aside = 0
        """Events that the log will not take; tried again by the next process."""
        self._settled: Offset = 0
        """Offset in the box up to which all is in the log, whether the disk lets go of it by now or not."""
        for record in box.read(_refused(topic), {}, BATCH):  # the log may take more than it did
            box.append(topic, record.key, record.event)
            box.discard(_refused(topic), record.offset)
        self.waiting, self._bytes = box.held(topic)
        self._ending = False
        self.more = threading.Event()
        """Set while anything waits."""
        if self.waiting:
            logger.info("%d events for %s wait in the outbox", self.waiting, topic)
            self.more.set()

    def submit(self, key: str, event: str) -> Future[Offset]:
        entry = _Entry(key, event, Future())
        entry.told.set_running_or_notify_cancel()
        with self._lock:
            number = self._sent = self._sent + 1
            waits = self.waiting > 0
            if waits:
                boxed = self._put([entry])
            else:
                sent = self._line.submit(self._topic, key, event)
                self._flying[number] = entry
        if waits:
            self._watch(boxed)
        else:
            sent.add_done_callback(partial(self._answered, number))
        return entry.told

    def drain(self) -> int:
        """Bring some of what waits to the log, the oldest first, and say how many. Raises LogUnavailable."""
        records = self._box.read(self._topic, {self._topic: self._settled}, BATCH)
        line = self._log.line()
        sent = [(record, self._handed_in(line, record)) for record in records]
        try:
            for record, future in sent:
                try:
                    future.result()
                except EventTooLarge as error:
                    self._refuse(record, error)
                self._settled = record.offset
        finally:  # what is settled does not go again, whatever became of those behind it
            with self._lock:
                self._forget((record.key, record.event) for record in records if record.offset <= self._settled)
            if records and records[0].offset <= self._settled:
                self._box.discard(self._topic, self._settled)
        return len(records)

    def _handed_in(self, line: Line, record: Record) -> Future[Offset]:
        try:
            return line.submit(self._topic, record.key, record.event)
        except EventTooLarge as error:  # its turn to be set aside comes when those before it are settled
            refused: Future[Offset] = Future()
            refused.set_exception(error)
            return refused

    def _refuse(self, record: Record, error: EventTooLarge) -> None:
        """Set aside what the log will never take, so that it does not keep those behind it."""
        self._box.append(_refused(self._topic), record.key, record.event)
        self.aside += 1
        logger.error("an event of %s is set aside in the outbox: %s", self._topic, error)

    def _answered(self, number: int, sent: Future[Offset]) -> None:
        """The log has kept an event, or has not: then it, and all that are on their way behind it, wait."""
        error = sent.exception()
        with self._lock:
            entry = self._flying.pop(number, None)
            if entry is None:
                return  # it waits already
            boxed = []
            if error is not None and not isinstance(error, EventTooLarge):
                both = {number: entry, **self._flying}
                self._flying.clear()
                boxed = self._put([both[each] for each in sorted(both)])
        if boxed:
            self._watch(boxed)
        elif error is not None:
            entry.told.set_exception(error)
        else:
            entry.told.set_result(sent.result())

    def _put(self, entries: Iterable[_Entry]) -> list[tuple[_Entry, Future[Offset]]]:
        """Hand entries to the box, in order, with the lock held; each with its answer to come."""
        boxed = []
        for entry in entries:
            full = self._bytes + entry.size > self._max_bytes
            self.waiting += 1
            self._bytes += entry.size
            boxed.append(
                (entry, _full(self._max_bytes) if full else self._box.submit(self._topic, entry.key, entry.event))
            )
        self.more.set()
        return boxed

    def _watch(self, boxed: Iterable[tuple[_Entry, Future[Offset]]]) -> None:
        for entry, put in boxed:
            put.add_done_callback(partial(self._boxed, entry))

    def _boxed(self, entry: _Entry, put: Future[Offset]) -> None:
        error = put.exception()
        if error is None:
            entry.told.set_result(WAITS)
            return
        with self._lock:
            self._forget([(entry.key, entry.event)])
        entry.told.set_exception(error)

    def _forget(self, gone: Iterable[tuple[str, str]]) -> None:
        """These wait no longer; with the lock held."""
        for key, event in gone:
            self.waiting -= 1
            self._bytes -= len(key) + len(event)
        if not self.waiting:
            self._line = self._log.line()
            if not self._ending:
                self.more.clear()

    def wake(self) -> None:
        """Let whoever waits for `more` go on, now and for ever."""
        with self._lock:
            self._ending = True
            self.more.set()


def _full(max_bytes: int) -> Future[Offset]:
    full: Future[Offset] = Future()
    full.set_exception(
        LogUnavailable(f"the log is away, and the outbox is full ({max_bytes / 1e6:g} MB, HEED_OUTBOX_MB)")
    )
    return full


def _refused(topic: str) -> str:
    return f"{topic}.refused"
