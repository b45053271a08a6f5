"""A SQLite file in WAL mode: made whole by one rename, read by connections that never write to it.

Where the file is the truth (the log), errors rise. Where it is not (the board), `OwnFile` makes it again, and
`OtherFile` reads it while it is there.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]
Statement = tuple[str, Row]
"""SQL, and the values for its question marks."""

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0

BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
"""Result codes of a file that is not what we made: torn, overwritten, or without our tables (SQLITE_ERROR).

Every other code passes: the disk is full, the writer is recovering, or it died and will be started again."""


_OURS = frozenset({0, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT})
"""Result codes of a statement that is wrong in itself (0: Python refused it); no other file would help."""


def code(error: sqlite3.Error) -> int:
    """The primary result code of an error; 0 where Python raised it without asking SQLite."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def make(path: Path, schema: str) -> None:
    """Make an empty database of this schema at `path`, whole and on disk before it bears its name.

    Does nothing where the file exists. Raises OSError or sqlite3.Error, e.g. on a full disk.
    """
    if path.exists():
        return
    make_folder(path.parent)
    remove(path)  # a -wal left by a deleted database would be replayed into the new one
    draft = path.with_name(path.name + ".new")
    remove(draft)
    with closing(sqlite3.connect(draft)) as db:
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(schema)
        db.execute("PRAGMA journal_mode=WAL")
    draft.replace(path)
    sync_folder(path.parent)


def open_writing(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """The connection of the one process that writes this file. Raises sqlite3.Error."""
    uri = path.absolute().as_uri() + "?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA fullfsync=ON")  # on macOS a plain fsync does not reach the disk
        db.execute(f"PRAGMA synchronous={synchronous}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def open_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write: one that could would checkpoint, and delete the WAL, when it closes."""
    uri = path.absolute().as_uri() + "?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def remove(path: Path) -> None:
    """Delete a database with what lies beside it; the database first, so that no reader meets it without its WAL."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file bears this name now (device, inode); None where none does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; each new name is on disk when this returns."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk: a new file's name is lost with the power until then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class OwnFile:
    """A file that this process alone writes: made again when lost or damaged, done without while the disk refuses."""

    def __init__(self, path: Path, schema: str) -> None:
        self._path = path
        self._schema = schema
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._away = False
        self._lock = threading.Lock()

    def read(self, sql: str, values: Row) -> list[Row]:
        """The rows; none while the file cannot be used."""
        return self._use(lambda db: db.execute(sql, values).fetchall(), wrote=False) or []

    def write(self, statements: Sequence[Statement]) -> bool:
        """Execute all of it in one transaction, and True; nothing and False while the file cannot be used."""

        def in_one_transaction(db: sqlite3.Connection) -> bool:
            if len(statements) == 1:  # a transaction by itself
                db.execute(*statements[0])
                return True
            db.execute("BEGIN IMMEDIATE")
            for sql, values in statements:
                db.execute(sql, values)
            db.execute("COMMIT")
            return True

        return self._use(in_one_transaction, wrote=True) is True

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _use(self, work: Callable[[sqlite3.Connection], T], wrote: bool) -> T | None:
        with self._lock:
            try:
                result = self._mending(work)
            except (sqlite3.Error, OSError) as error:
                if isinstance(error, sqlite3.Error) and code(error) in _OURS:
                    raise
                if not self._away:
                    logger.warning("cannot use %s (%s): going on without it", self._path, error)
                self._away = True
                return None
            self._away = self._away and not wrote  # a full disk can still be read
            return result

    def _mending(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` gives; where the file turns out to be damaged, what it gives on a new one."""
        try:
            return self._working(work)
        except sqlite3.DatabaseError as error:
            if code(error) not in BROKEN:
                raise
            logger.warning("%s is damaged (%s): it is made again, empty", self._path, error)
        remove(self._path)
        return self._working(work)

    def _working(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._open())
        except BaseException:
            self._drop()  # with whatever transaction is open in it
            raise

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and identity(self._path) != self._identity:
            self._drop()  # deleted, or put in place by other hands: what we hold bears no name any more
        if self._db is None:
            make(self._path, self._schema)
            self._db = open_writing(self._path, synchronous="NORMAL")
            self._identity = identity(self._path)
        return self._db

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


class OtherFile:
    """A file that another process writes, and makes again when it is damaged: read while it is there and whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def read(self, sql: str, values: Row) -> list[Row]:
        """The rows; none while the file cannot be read."""
        with self._lock:
            now = identity(self._path)
            if now != self._identity:
                self._drop()
            if now is None:
                return []
            try:
                if self._db is None:
                    self._db, self._identity = open_reading(self._path), now
                return self._db.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                self._drop()
                if code(error) == 0:
                    raise
                logger.debug("cannot read %s: %s", self._path, error)
                return []

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
