"""What is known already: the learner's state file, read without ever writing while the learner runs, and a file's lines."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from deploy.door import NotDone
from deploy.past import BadLine
from feedback.sqlite_file import open_reading
from learner.config import LearnerConfig
from learner.statefile import STATE_SCHEMA


def state_path(config: LearnerConfig) -> Path:
    return config.folder / "state.db"


@contextmanager
def reading(config: LearnerConfig) -> Iterator[sqlite3.Connection]:
    """What the learner knows, as it is at this moment. Raises NotDone where there is nothing, or nothing that can be read."""
    path = state_path(config)
    if not path.exists():
        raise NotDone(
            f"there is no learner state {path} yet: the learner makes it from the log when it runs "
            "(heed up, heed learn; once: heed learn --until-idle)."
        )
    try:
        with closing(open_reading(path)) as db:
            db.execute("BEGIN")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if not 0 < found <= STATE_SCHEMA:
                raise NotDone(f"learner state {path} has schema {found}; this Heed reads 1 to {STATE_SCHEMA}.")
            yield db
    except sqlite3.DatabaseError as error:
        raise NotDone(f"learner state {path} cannot be read ({error}). heed learn --rebuild makes it anew.") from error


class Known:
    """What was met before: by the learner, and in this file. On disk, so that memory does not grow with the file."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._opened = ExitStack()

    def __enter__(self) -> Known:
        there = state_path(self._config).exists()
        self._state = self._opened.enter_context(reading(self._config)) if there else None
        self._seen = self._opened.enter_context(closing(sqlite3.connect("", isolation_level=None)))
        self._seen.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE seen (name BLOB PRIMARY KEY, content BLOB, repeats INTEGER) WITHOUT ROWID; BEGIN;"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def by_the_learner(self, values: Mapping[str, object]) -> bool:
        """Whether a row was exported from this very data folder: to import it would count it twice."""
        if self._state is None:
            return False
        tables = {"feedback": ("id", values.get("id")), "exchanges": ("reply_id", values.get("reply_id"))}
        return any(
            self._state.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (str(value),)).fetchone()
            for table, (column, value) in tables.items()
            if value is not None
        )

    def repeats(self, name: str | None, content: bytes) -> int:
        """How often this line was met before. Raises BadLine where its id was another line's."""
        digest = hashlib.blake2b(content, digest_size=16).digest()
        key = digest if name is None else name.encode()
        repeats, first = self._seen.execute(
            "INSERT INTO seen VALUES (?, ?, 0) ON CONFLICT (name) DO UPDATE SET repeats = repeats + 1"
            " RETURNING repeats, content",
            (key, digest),
        ).fetchone()
        if first != digest:
            raise BadLine("id", f"{name!r} is that of an earlier line which says something else")
        return int(repeats)
