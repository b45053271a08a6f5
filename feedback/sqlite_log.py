"""The embedded log: one SQLite file a topic, which is its one partition, in WAL mode, with one writing process and many readers.

The life of an event: `submit` queues it; the writer thread takes everything queued, writes it in one transaction a
topic, and resolves the futures when SQLite has synced the WAL. Readers see a transaction only after that sync, so
nothing that was read can be lost with the power. Between two batches the same thread lets go of what is not to be kept,
a slice at a time, lest appends wait.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue

from feedback import sqlite_file
from feedback.keeping import EVERYTHING, Keep
from feedback.log import Line, LogUnavailable, Offset, Offsets, Record
from feedback.sqlite_topic import SLICE, Entry, TopicFile, topic_path

logger = logging.getLogger(__name__)

GATHER_S = 0.004
CROWD = 4
"""Where more than a few came together, the next are let gather: a transaction costs more than an event in it."""
MAX_BATCH = 1000
"""Events in one transaction: bounds how long the first of them waits for the last."""

TIDY_S = 60.0
"""Between two looks at what is not to be kept any more."""


class SqliteLog:
    """The topics of one folder: those in `writes` are this process's to write and to `keep`, every topic can be read.

    Raises LogUnavailable where another process writes one of `writes`, or its file cannot be opened.
    """

    def __init__(self, folder: Path, writes: Collection[str], keep: Keep = EVERYTHING) -> None:
        self._folder = folder
        self._writer = _Writer(folder, writes, keep) if writes else None
        self._readers: dict[str, _Reader] = {}
        self._lock = threading.Lock()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        return self._writing(topic).submit(topic, key, event)

    def line(self) -> Line:
        return self  # an event that fails here was not kept, and no batch is in doubt

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        rows = self._reader(topic).select(
            "SELECT offset, key, event FROM records WHERE offset > ? ORDER BY offset LIMIT ?",
            (after.get(topic, 0), max(max_events, 0)),
        )
        return [Record(topic, topic, offset, key, event) for offset, key, event in rows]

    def end(self, topic: str) -> Offsets:
        # not the last record's offset: that one may have been discarded
        rows = self._reader(topic).select(
            "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'records'", ()
        )
        return {topic: int(rows[0][0])} if rows else {}

    def held(self, topic: str) -> tuple[int, int]:
        """How many records a topic has, and the characters of their keys and events. Raises LogUnavailable."""
        rows = self._reader(topic).select(
            "SELECT count(*), coalesce(sum(length(key) + length(event)), 0) FROM records", ()
        )
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

    def discard(self, topic: str, through: Offset) -> None:
        """Remove every record up to the offset `through`; no offset is ever used again.

        Returns once that is durable. A tenth of the file stays free for what comes, the rest goes back to the disk (of a
        file made by an older Heed all stays free). Raises LogUnavailable, ValueError as `append` does.
        """
        writer = self._writing(topic)
        while writer.discard(topic, through) == SLICE:
            pass

    def away(self) -> bool:
        with self._lock:
            return any(reader.waiting for reader in self._readers.values())

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
        if self._writer is not None:
            self._writer.close()  # last: whoever writes leaves the file checkpointed, and the WAL gone

    def _writing(self, topic: str) -> _Writer:
        if self._writer is None or topic not in self._writer.topics:
            raise ValueError(f"this log was not opened to write {topic!r}: name it in `writes`")
        return self._writer

    def _reader(self, topic: str) -> _Reader:
        with self._lock:
            if topic not in self._readers:
                self._readers[topic] = _Reader(topic_path(self._folder, topic))
            return self._readers[topic]


class _Reader:
    """Reads one topic's file, which another process may not have made yet, or may be recovering."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self.waiting = False
        self._lock = threading.Lock()

    def select(self, sql: str, values: sqlite_file.Row) -> list[sqlite_file.Row]:
        """The rows, none where the file is away for now. Raises LogUnavailable where it is damaged."""
        with self._lock:
            try:
                rows = self._rows(sql, values)
            except sqlite3.Error as error:
                self._drop()  # opened again by the next read: what this connection knows may be stale
                if sqlite_file.code(error) in sqlite_file.BROKEN:
                    raise LogUnavailable(f"cannot read the log {self._path}: {error}") from error
                if not self.waiting:
                    logger.warning("cannot read the log %s yet (%s); trying again", self._path, error)
                self.waiting = True
                return []
            self.waiting = False
            return rows

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _rows(self, sql: str, values: sqlite_file.Row) -> list[sqlite_file.Row]:
        if self._db is None:
            if not self._path.exists():
                return []
            self._db = sqlite_file.open_reading(self._path)
        return self._db.execute(sql, values).fetchall()

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


class _Writer:
    """The one thread of this process that writes, and the locks that keep every other process from it."""

    def __init__(self, folder: Path, topics: Collection[str], keep: Keep) -> None:
        self.topics = frozenset(topics)
        self._keep = keep
        self._queue: SimpleQueue[Entry | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as opened:
            self._files = {topic: opened.enter_context(TopicFile(folder, topic)) for topic in sorted(topics)}
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="heed-log-writer", daemon=True)
        self._thread.start()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        (key + event).encode()  # text that is no UTF-8 would fail everyone's batch: it fails its own caller here
        return self._hand_in(Entry(topic, key, event, time.time()))

    def discard(self, topic: str, through: Offset) -> int:
        """Remove a slice of what is up to `through`, and say how many records went."""
        return self._hand_in(Entry(topic, through=through)).result()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._opened.close()

    def _hand_in(self, entry: Entry) -> Future[int]:
        entry.kept.set_running_or_notify_cancel()  # from here on it cannot be cancelled: it will be done
        with self._closing:
            if self._closed:
                raise LogUnavailable(f"the log is closed: nothing more is written to {entry.topic}")
            self._queue.put(entry)
        return entry.kept

    def _run(self) -> None:
        self._crowded = False
        more, tidy_at = True, time.monotonic()
        while more:
            if time.monotonic() >= tidy_at and not self._tidy():
                tidy_at = time.monotonic() + TIDY_S
            batch, more = self._next_batch(tidy_at)
            self._crowded = len(batch) > CROWD
            for topic, file in self._files.items():
                entries = [entry for entry in batch if entry.topic == topic]
                if entries:
                    _keep(file, entries)

    def _next_batch(self, until: float) -> tuple[list[Entry], bool]:
        """Everything queued (waits for the first, at most until a time), and whether more may follow."""
        batch: list[Entry] = []
        try:
            entry = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            if self._crowded:
                time.sleep(GATHER_S)
            while entry is not None:
                batch.append(entry)
                if len(batch) == MAX_BATCH:
                    return batch, True
                entry = self._queue.get_nowait()
        except Empty:
            return batch, True
        return batch, False

    def _tidy(self) -> bool:
        """Let go of a slice of each topic that is older, or more, than is kept; true while there may be more of it."""
        if self._keep == EVERYTHING:
            return False
        try:
            return SLICE in [file.tidy(self._keep) for file in self._files.values()]
        except (sqlite3.Error, OSError) as error:
            logger.warning("cannot remove what is not to be kept from the log (%s); trying again in a while", error)
            return False


def _keep(file: TopicFile, entries: Sequence[Entry]) -> None:
    """Write a batch and tell everyone who waits: a number each, or the same failure for all."""
    try:
        numbers = file.write(entries)
    except Exception as error:  # whatever it is, those who wait must hear of it
        for entry in entries:
            so = "" if entry.event is None else "; the event was not kept"
            failure = LogUnavailable(f"cannot write the log {file.path}: {error}{so}")
            failure.__cause__ = error
            entry.kept.set_exception(failure)
        return
    for entry, number in zip(entries, numbers, strict=True):
        entry.kept.set_result(number)
