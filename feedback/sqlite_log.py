"""The embedded log: one SQLite file a topic, which is its one partition, in WAL mode, with one writing process and many readers.

The life of an event: `submit` queues it; the writer thread takes everything queued, writes it in one transaction a
topic, and resolves the futures when SQLite has synced the WAL. Readers see a transaction only after that sync, so
nothing that was read can be lost with the power.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from feedback import sqlite_file
from feedback.log import LogUnavailable, Offset, Offsets, Record

logger = logging.getLogger(__name__)

MAX_BATCH = 1000
"""Events in one transaction: bounds how long the first of them waits for the last."""

SCHEMA = """
CREATE TABLE records (
    offset INTEGER PRIMARY KEY AUTOINCREMENT,
    key    TEXT NOT NULL,
    at     REAL NOT NULL,
    event  TEXT NOT NULL
) STRICT;
"""


class SqliteLog:
    """The topics of one folder: those in `writes` are this process's to write, every topic can be read.

    Raises LogUnavailable where another process writes one of `writes`, or its file cannot be opened.
    """

    def __init__(self, folder: Path, writes: Collection[str]) -> None:
        self._folder = folder
        self._writer = _Writer(folder, writes) if writes else None
        self._readers: dict[str, _Reader] = {}
        self._lock = threading.Lock()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        if self._writer is None or topic not in self._writer.topics:
            raise ValueError(f"this log was not opened to write {topic!r}: name it in `writes`")
        return self._writer.submit(topic, key, event)

    def append(self, topic: str, key: str, event: str) -> Offset:
        return self.submit(topic, key, event).result()

    def read(self, topic: str, after: Offsets, max_events: int) -> list[Record]:
        rows = self._reader(topic).select(
            "SELECT offset, key, event FROM records WHERE offset > ? ORDER BY offset LIMIT ?",
            (after.get(topic, 0), max(max_events, 0)),
        )
        return [Record(topic, topic, offset, key, event) for offset, key, event in rows]

    def end(self, topic: str) -> Offsets:
        rows = self._reader(topic).select("SELECT coalesce(max(offset), 0) FROM records", ())
        return {topic: int(rows[0][0])} if rows else {}

    def held(self, topic: str) -> tuple[int, int]:
        """How many records a topic has, and the characters of their keys and events. Raises LogUnavailable."""
        rows = self._reader(topic).select("SELECT count(*), coalesce(sum(length(key) + length(event)), 0) FROM records", ())
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

    def discard(self, topic: str, through: Offset) -> None:
        db = sqlite_file.open_writing(_path(self._folder, topic), synchronous="FULL")
        db.execute("DELETE FROM records WHERE offset <= ?", (through,))
        db.close()

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        with self._lock:
            for reader in self._readers.values():
                reader.close()
        if self._writer is not None:
            self._writer.close()  # last: whoever writes leaves the file checkpointed, and the WAL gone

    def _reader(self, topic: str) -> _Reader:
        with self._lock:
            if topic not in self._readers:
                self._readers[topic] = _Reader(_path(self._folder, topic))
            return self._readers[topic]


class _Reader:
    """Reads one topic's file, which another process may not have made yet, or may be recovering."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._waiting = False
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
                if not self._waiting:
                    logger.warning("cannot read the log %s yet (%s); trying again", self._path, error)
                self._waiting = True
                return []
            self._waiting = False
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


@dataclass(frozen=True, slots=True)
class _Entry:
    topic: str
    key: str
    event: str
    at: float
    kept: Future[Offset] = field(default_factory=Future)


class _Writer:
    """The one thread of this process that writes, and the locks that keep every other process from it."""

    def __init__(self, folder: Path, topics: Collection[str]) -> None:
        self.topics = frozenset(topics)
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        with contextlib.ExitStack() as opened:
            self._files = {topic: opened.enter_context(_TopicFile(folder, topic)) for topic in sorted(topics)}
            self._opened = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="heed-log-writer", daemon=True)
        self._thread.start()

    def submit(self, topic: str, key: str, event: str) -> Future[Offset]:
        (key + event).encode()  # text that is no UTF-8 would fail everyone's batch: it fails its own caller here
        entry = _Entry(topic, key, event, time.time())
        entry.kept.set_running_or_notify_cancel()  # from here on it cannot be cancelled: it will be kept
        with self._closing:
            if self._closed:
                raise LogUnavailable(f"the log is closed: the event for {topic} was not kept")
            self._queue.put(entry)
        return entry.kept

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._opened.close()

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._next_batch()
            for topic, file in self._files.items():
                entries = [entry for entry in batch if entry.topic == topic]
                if entries:
                    _keep(file, entries)

    def _next_batch(self) -> tuple[list[_Entry], bool]:
        """Everything queued (waits for the first), and whether more may follow."""
        entry = self._queue.get()
        batch: list[_Entry] = []
        while entry is not None:
            batch.append(entry)
            if len(batch) == MAX_BATCH:
                return batch, True
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return batch, True
        return batch, False


def _keep(file: _TopicFile, entries: Sequence[_Entry]) -> None:
    """Write a batch and tell everyone who waits: an offset each, or the same failure for all."""
    try:
        offsets = file.append(entries)
    except Exception as error:  # whatever it is, those who wait must hear of it
        for entry in entries:
            failure = LogUnavailable(f"cannot write the log {file.path}: {error}; the event was not kept")
            failure.__cause__ = error
            entry.kept.set_exception(failure)
        return
    for entry, offset in zip(entries, offsets, strict=True):
        entry.kept.set_result(offset)


class _TopicFile:
    """One topic's file, ours to write while the lock beside it is held."""

    def __init__(self, folder: Path, topic: str) -> None:
        self.path = _path(folder, topic)
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None

    def __enter__(self) -> _TopicFile:
        try:
            sqlite_file.make_folder(self.path.parent)
            self._lock = _lock(self.path.with_suffix(".lock"))
            sqlite_file.make(self.path, SCHEMA)
            self._open().execute("SELECT max(offset) FROM records").fetchone()
            self._sync_what_was_left()
        except (sqlite3.Error, OSError) as error:
            self.__exit__()
            raise LogUnavailable(f"cannot open the log {self.path}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, entries: Sequence[_Entry]) -> list[Offset]:
        """The entries' offsets, once all are durable; or raises, e.g. sqlite3.Error, and keeps none of them."""
        try:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            offsets = [_insert(db, entry) for entry in entries]
            db.execute("COMMIT")
        except BaseException:
            self._drop()  # closing rolls back; what state a failed write leaves a connection in is not worth knowing
            raise
        return offsets

    def _sync_what_was_left(self) -> None:
        """Bring to disk what a killed writer had written and not yet synced: whoever reads it now may rely on it."""
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk is the next append's to report
            self._open().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite_file.open_writing(self.path, synchronous="FULL")
        return self._db

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _insert(db: sqlite3.Connection, entry: _Entry) -> Offset:
    cursor = db.execute("INSERT INTO records (key, at, event) VALUES (?, ?, ?)", (entry.key, entry.at, entry.event))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _path(folder: Path, topic: str) -> Path:
    return folder / f"{topic}.db"


def _lock(path: Path) -> int:
    """An OS lock, held until the handle is closed or the process ends. Raises LogUnavailable where another has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise LogUnavailable(
            f"the log {path.with_suffix('.db')} is being written by another process (pid {holder}): a data folder "
            "belongs to one server and one learner. Stop that one, or give this one a HEED_DATA of its own"
        ) from None
    with contextlib.suppress(OSError):  # the pid is for the message above only; a full disk may refuse it
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    return handle
