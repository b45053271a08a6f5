"""The embedded log: one SQLite file a topic, which is its one partition, in WAL mode, with one writing process and many readers.

The life of an event: `submit` queues it; the writer thread takes everything queued, writes it in one transaction a
topic, and resolves the futures when SQLite has synced the WAL. Readers see a transaction only after that sync, so
nothing that was read can be lost with the power. Between two batches the same thread lets go of what is not to be kept,
a slice at a time, lest appends wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from feedback import sqlite_file
from feedback.keeping import EVERYTHING, Keep
from feedback.log import LogUnavailable, Offset, Offsets, Record

logger = logging.getLogger(__name__)

MAX_BATCH = 1000
"""Events in one transaction: bounds how long the first of them waits for the last."""

SLICE = 200
"""Records let go of in one transaction."""

TIDY_S = 60.0
"""Between two looks at what is not to be kept any more."""

SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
CREATE TABLE records (
    offset INTEGER PRIMARY KEY AUTOINCREMENT,
    key    TEXT NOT NULL,
    at     REAL NOT NULL,
    event  TEXT NOT NULL
) STRICT;
"""


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

    def discard(self, topic: str, through: Offset) -> None:
        """Remove every record up to the offset `through`; no offset is ever used again.

        Returns once that is durable. A tenth of the file stays free for what comes, the rest goes back to the disk (of a
        file made by an older Heed all stays free). Raises LogUnavailable, ValueError as `append` does.
        """
        writer = self._writing(topic)
        while writer.discard(topic, through) == SLICE:
            pass

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
    """An event to append, or (without one) an offset up to which one slice is to go; `kept` tells how it went."""

    topic: str
    key: str = ""
    event: str | None = None
    at: float = 0.0
    through: Offset = 0
    kept: Future[int] = field(default_factory=Future)


class _Writer:
    """The one thread of this process that writes, and the locks that keep every other process from it."""

    def __init__(self, folder: Path, topics: Collection[str], keep: Keep) -> None:
        self.topics = frozenset(topics)
        self._keep = keep
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
        return self._hand_in(_Entry(topic, key, event, time.time()))

    def discard(self, topic: str, through: Offset) -> int:
        """Remove a slice of what is up to `through`, and say how many records went."""
        return self._hand_in(_Entry(topic, through=through)).result()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._opened.close()

    def _hand_in(self, entry: _Entry) -> Future[int]:
        entry.kept.set_running_or_notify_cancel()  # from here on it cannot be cancelled: it will be done
        with self._closing:
            if self._closed:
                raise LogUnavailable(f"the log is closed: nothing more is written to {entry.topic}")
            self._queue.put(entry)
        return entry.kept

    def _run(self) -> None:
        more, tidy_at = True, time.monotonic()
        while more:
            if time.monotonic() >= tidy_at and not self._tidy():
                tidy_at = time.monotonic() + TIDY_S
            batch, more = self._next_batch(tidy_at)
            for topic, file in self._files.items():
                entries = [entry for entry in batch if entry.topic == topic]
                if entries:
                    _keep(file, entries)

    def _next_batch(self, until: float) -> tuple[list[_Entry], bool]:
        """Everything queued (waits for the first, at most until a time), and whether more may follow."""
        batch: list[_Entry] = []
        try:
            entry = self._queue.get(timeout=max(0.0, until - time.monotonic()))
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
            return any(file.tidy(self._keep) == SLICE for file in self._files.values())
        except (sqlite3.Error, OSError) as error:
            logger.warning("cannot remove what is not to be kept from the log (%s); trying again in a while", error)
            return False


def _keep(file: _TopicFile, entries: Sequence[_Entry]) -> None:
    """Write a batch and tell everyone who waits: a number each, or the same failure for all."""
    try:
        numbers = file.write(entries)
    except Exception as error:  # whatever it is, those who wait must hear of it
        for entry in entries:
            failure = LogUnavailable(f"cannot write the log {file.path}: {error}; the event was not kept")
            failure.__cause__ = error
            entry.kept.set_exception(failure)
        return
    for entry, number in zip(entries, numbers, strict=True):
        entry.kept.set_result(number)


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

    def write(self, entries: Sequence[_Entry]) -> list[int]:
        """An offset for each event, for each discard how many went, once all is durable; or raises, and did none of it."""
        with self._transaction() as db:
            numbers = [_discard(db, entry.through) if entry.event is None else _insert(db, entry) for entry in entries]
        if any(entry.event is None for entry in entries):
            _give_room_back(db)
        return numbers

    def tidy(self, keep: Keep) -> int:
        """Let go of a slice of what is older, or more, than is kept, and say how many records went. Raises sqlite3.Error.

        The newest record stays, whatever its age: a reader that has come to it has come to the log's end.
        """
        db = self._open()
        over = _used(db) - keep.size
        rows = db.execute(
            "SELECT offset, at, length(event) FROM records WHERE offset < (SELECT max(offset) FROM records)"
            " ORDER BY offset LIMIT ?",
            (SLICE,),
        )
        through = 0
        for offset, at, size in rows:
            if at >= time.time() - keep.age_s and over <= 0:
                break
            through, over = offset, over - size
        if not through:
            return 0
        with self._transaction() as db:
            went = _discard(db, through)
        _give_room_back(db)
        return went

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block, durable once left, or nothing of it."""
        try:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except BaseException:
            self._drop()  # closing rolls back; what state a failed write leaves a connection in is not worth knowing
            raise

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
    values = (entry.key, entry.at, entry.event)
    cursor = db.execute("INSERT INTO records (key, at, event) VALUES (?, ?, ?)", values)
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _discard(db: sqlite3.Connection, through: Offset) -> int:
    """Remove the oldest records, a slice at most, up to an offset, and say how many went."""
    oldest = "SELECT offset FROM records WHERE offset <= ? ORDER BY offset LIMIT ?"
    return db.execute(f"DELETE FROM records WHERE offset IN ({oldest})", (through, SLICE)).rowcount


def _give_room_back(db: sqlite3.Connection) -> None:
    """Cut the file's end off where more than a tenth of it is free; what stays free is written again."""
    spare = _pragma(db, "freelist_count") - _pragma(db, "page_count") // 10
    if spare > 0:
        with contextlib.suppress(sqlite3.OperationalError):  # e.g. a full disk: the next slice tries again
            db.executescript(f"PRAGMA incremental_vacuum({spare})")  # `execute` would free a single page


def _used(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold anything."""
    return (_pragma(db, "page_count") - _pragma(db, "freelist_count")) * _pragma(db, "page_size")


def _pragma(db: sqlite3.Connection, name: str) -> int:
    value: int = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value


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
