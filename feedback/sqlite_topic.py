"""One topic's file of the embedded log, as the one process that writes it sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from feedback import sqlite_file
from feedback.keeping import Keep
from feedback.log import LogUnavailable, Offset

ROWS = 300
"""Of one statement: SQLite allows 999 values, or more where it is newer."""
SLICE = 200
"""Records let go of in one transaction."""

SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
CREATE TABLE records (
    offset INTEGER PRIMARY KEY AUTOINCREMENT,
    key    TEXT NOT NULL,
    at     REAL NOT NULL,
    event  TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """An event to append, or (without one) an offset up to which one slice is to go; `kept` tells how it went."""

    topic: str
    key: str = ""
    event: str | None = None
    at: float = 0.0
    through: Offset = 0
    kept: Future[int] = field(default_factory=Future)


class TopicFile:
    """One topic's file, ours to write while the lock beside it is held."""

    def __init__(self, folder: Path, topic: str) -> None:
        self.path = topic_path(folder, topic)
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None

    def __enter__(self) -> TopicFile:
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

    def write(self, entries: Sequence[Entry]) -> list[int]:
        """An offset for each event, for each discard how many went, once all is durable; or raises, and did none of it."""
        if len(entries) <= ROWS and all(entry.event is not None for entry in entries):
            return self._insert_at_once(entries)
        with self._transaction() as db:
            numbers = list[int]()
            for discards, run in groupby(entries, key=lambda entry: entry.event is None):
                some = list(run)
                numbers += [_discard(db, entry.through) for entry in some] if discards else _insert(db, some)
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
        ).fetchall()
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

    def _insert_at_once(self, entries: Sequence[Entry]) -> list[Offset]:
        """One statement is a transaction by itself."""
        try:
            return _insert(self._open(), entries)
        except BaseException:
            self._drop()
            raise

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


def _insert(db: sqlite3.Connection, entries: Sequence[Entry]) -> list[Offset]:
    """Many rows a statement: between two statements another thread may take its turn, and they wait for each other."""
    offsets = list[Offset]()
    for first in range(0, len(entries), ROWS):
        rows = entries[first : first + ROWS]
        marks = ", ".join(["(?, ?, ?)"] * len(rows))
        values = [value for entry in rows for value in (entry.key, entry.at, entry.event)]
        last = db.execute(f"INSERT INTO records (key, at, event) VALUES {marks}", values).lastrowid
        assert last is not None
        offsets += range(last - len(rows) + 1, last + 1)  # ours alone to write, and they grow by one
    return offsets


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


def topic_path(folder: Path, topic: str) -> Path:
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
