"""The learner's state file: its tables, and opening it without ever guessing.

The file is one SQLite database. Whatever it holds can be made again from the log, so a file that cannot be trusted is
refused with the command that makes it anew, never repaired in place. A file of an older Heed is brought up to date, one
schema after the other, from nothing but itself.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

_TABLES = """
CREATE TABLE offsets (topic TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE counters (name TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;

CREATE TABLE exchanges (
    reply_id   TEXT PRIMARY KEY,
    policy     TEXT NOT NULL,
    base       TEXT NOT NULL,
    version    INTEGER NOT NULL,
    at         REAL NOT NULL,
    prompt_ids TEXT NOT NULL,
    reply_ids  TEXT NOT NULL,
    event      TEXT NOT NULL
);

CREATE TABLE feedback (
    id         TEXT PRIMARY KEY,
    place      INTEGER NOT NULL,
    kind       TEXT NOT NULL,
    user       TEXT,
    aspect     TEXT NOT NULL,
    value      REAL,
    at         REAL NOT NULL,
    body       TEXT NOT NULL,
    reply_id   TEXT NOT NULL,
    other_id   TEXT,
    event      TEXT NOT NULL,
    status     TEXT NOT NULL CHECK (status IN ('pending', 'joined', 'superseded', 'retracted', 'dropped')),
    reason     TEXT,
    policy     TEXT,
    base       TEXT,
    untrained  TEXT,
    learned_in INTEGER,
    fresh_s    REAL
);
CREATE INDEX feedback_by_opinion ON feedback (reply_id, user, aspect);
CREATE INDEX feedback_by_status ON feedback (status, untrained, learned_in);

CREATE TABLE awaited (reply_id TEXT, feedback_id TEXT, PRIMARY KEY (reply_id, feedback_id)) WITHOUT ROWID;
CREATE INDEX awaited_by_feedback ON awaited (feedback_id);

CREATE TABLE retractions (id TEXT PRIMARY KEY) WITHOUT ROWID;

CREATE TABLE parked (topic TEXT, place INTEGER, event TEXT NOT NULL, PRIMARY KEY (topic, place));

CREATE TABLE stories (
    feedback_id TEXT NOT NULL,
    status      TEXT NOT NULL,
    at          REAL NOT NULL,
    in_update   INTEGER,
    version     INTEGER,
    reason      TEXT,
    told        INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (feedback_id, status)
);
CREATE INDEX stories_untold ON stories (told) WHERE told = 0;

CREATE TABLE updates (
    number   INTEGER PRIMARY KEY,
    status   TEXT NOT NULL CHECK (status IN ('running', 'refused', 'published', 'released', 'passed_over', 'failed')),
    started  REAL NOT NULL,
    finished REAL,
    current  INTEGER NOT NULL,
    offsets  TEXT NOT NULL,
    feedback INTEGER NOT NULL,
    version  INTEGER,
    why      TEXT,
    report   TEXT,
    gate     TEXT
);
"""

# Partitions, of which an older Heed's log had one a topic. Every reply that feedback speaks of, whether its exchange is
# there or not: one may come late, or leave. Feedback told again under its id. What was given up is waited for anew.
_PARTITIONS = """
ALTER TABLE offsets RENAME COLUMN topic TO partition;
ALTER TABLE parked RENAME COLUMN topic TO partition;

ALTER TABLE exchanges ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
UPDATE exchanges SET size = length(event) + length(prompt_ids) + length(reply_ids);
CREATE INDEX exchanges_by_age ON exchanges (at, size);

ALTER TABLE feedback ADD COLUMN partition TEXT NOT NULL DEFAULT 'heed.feedback';
ALTER TABLE feedback ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
UPDATE feedback SET size = length(event);
CREATE INDEX feedback_by_age ON feedback (at, id, size);

CREATE TABLE about (feedback_id TEXT, reply_id TEXT, PRIMARY KEY (feedback_id, reply_id)) WITHOUT ROWID;
CREATE INDEX about_by_reply ON about (reply_id);
INSERT OR IGNORE INTO about
    SELECT f.id, reply.value FROM feedback f, json_each(f.event, '$.reply_ids') reply WHERE f.reason IS NOT 'malformed';
DROP TABLE awaited;

CREATE TABLE repeats (
    partition   TEXT,
    place       INTEGER,
    feedback_id TEXT NOT NULL,
    at          REAL NOT NULL,
    body        TEXT NOT NULL,
    event       TEXT NOT NULL,
    PRIMARY KEY (partition, place)
) WITHOUT ROWID;
CREATE INDEX repeats_by_feedback ON repeats (feedback_id);

ALTER TABLE retractions ADD COLUMN at REAL NOT NULL DEFAULT 0;
UPDATE retractions SET at = CAST(strftime('%s', 'now') AS REAL);

DELETE FROM stories
    WHERE status = 'dropped' AND feedback_id IN (SELECT id FROM feedback WHERE reason = 'no_exchange');
UPDATE feedback SET status = 'pending', reason = NULL WHERE reason = 'no_exchange';
UPDATE feedback SET policy = NULL, base = NULL, untrained = NULL WHERE status != 'joined';

-- the exchanges that no version of ours spoke in
CREATE INDEX imported ON exchanges (reply_id) WHERE json_extract(event, '$.source') = 'imported';
"""

# Rankings, corrections, signals and what is said of an aspect are learned from.
_EVERY_KIND = """
UPDATE feedback
    SET untrained = (SELECT 'empty_reply' FROM about a JOIN exchanges e ON e.reply_id = a.reply_id
                     WHERE a.feedback_id = feedback.id AND e.reply_ids = '[]')
    WHERE untrained = 'aspect' OR untrained = 'kind' AND kind != 'comment';
"""

# Feedback on replies of any base is learned from: feedback.learned_in names an update of this one.
_BASES = """
CREATE TABLE learned_by (policy TEXT PRIMARY KEY, base TEXT NOT NULL) WITHOUT ROWID;
INSERT OR REPLACE INTO learned_by
    SELECT policy, base FROM feedback WHERE learned_in > 0 AND policy IS NOT NULL AND base IS NOT NULL ORDER BY learned_in;
UPDATE feedback SET learned_in = NULL
    WHERE learned_in > 0 AND base != (SELECT base FROM learned_by l WHERE l.policy = feedback.policy);
"""

# Why the last update did not use what it might have learned from. Of updates of an older Heed nobody knows.
_LEFT_OUT = """
ALTER TABLE feedback ADD COLUMN left_out TEXT;
"""

# The version that an update went on from, which was the released one unless its base did not speak that.
_PARENTS = """
ALTER TABLE updates ADD COLUMN parent INTEGER NOT NULL DEFAULT 0;
UPDATE updates SET parent = current;
"""

SCRIPTS = (_TABLES, _PARTITIONS, _EVERY_KIND, _BASES, _LEFT_OUT, _PARENTS)
"""What makes each schema from the one before it; the first, from nothing."""

STATE_SCHEMA = len(SCRIPTS)


class StateError(Exception):
    """The state file cannot be used; the message says why and what to do."""


def open_state(path: Path) -> sqlite3.Connection:
    """The state file's connection, in autocommit mode; an absent file is made.

    One thread at a time may use it (the learner absorbs and trains on one). Raises StateError for a file that is
    corrupt, none of ours, or written by a newer Heed; sqlite3.OperationalError while the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        _check(db, path)
    except sqlite3.OperationalError:
        db.close()
        raise  # the disk is full or away, and the file may be well
    except sqlite3.DatabaseError as error:
        db.close()
        raise StateError(_cannot(path, str(error))) from error
    except StateError:
        db.close()
        raise
    return db


def remove_state(path: Path) -> None:
    """Take the state file and its journals away, so that the next opening starts from the log's beginning."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _check(db: sqlite3.Connection, path: Path) -> None:
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found > STATE_SCHEMA:
        raise StateError(
            f"learner state {path} has schema {found}; this Heed reads up to {STATE_SCHEMA}. "
            "Run the newer Heed that wrote it, or `heed learn --rebuild` to make it anew from the log."
        )
    if found == 0 and db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise StateError(_cannot(path, "it holds tables that are not ours"))
    verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise StateError(_cannot(path, verdict))
    for number, script in enumerate(SCRIPTS[found:], found + 1):
        # one script, one transaction: a kill leaves either the schema before it or this one, whole
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


def _cannot(path: Path, what: str) -> str:
    remedy = "`heed learn --rebuild` makes it anew from the log; nothing is lost"
    return f"learner state {path} cannot be used ({what}). {remedy}."
