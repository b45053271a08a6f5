"""The learner's state file: a file of an older Heed is brought up to date from itself, wholly or not at all."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from feedback.events import EXCHANGES, FEEDBACK
from learner import statefile
from learner.ledger import Ledger
from learner.report import feedback_counts
from learner.state import State
from learner.statefile import STATE_SCHEMA, StateError, open_state
from tests.told import BASE, NOW, POLICY, exchange, feedback, records, retraction

# as Heed 0.1 made it: never to be changed
SCHEMA_1 = """
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

EVENTS = (
    exchange("r"),
    exchange("late"),
    feedback("first", "r", value=1),
    feedback("second", "r", value=0, at=NOW + 1),
    feedback("waiting", "nowhere", at=NOW),
    feedback("given up", "lost", at=NOW - 100),
    feedback("given up too early", "late", at=NOW - 100),
    feedback("bad", "r", value=0.5),
    feedback("back", "r", user="bob"),
    retraction("back"),
    feedback("second", "r", value=0, at=NOW + 1),
    "nonsense",
)


def file_of_schema_1(path: Path) -> None:
    """A file as Heed 0.1 left it: every table has rows, every status is there."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA_1 + "PRAGMA journal_mode = WAL; PRAGMA user_version = 1;")
        told = records(*EVENTS)
        texts = {json.loads(record.event)["id"]: record for record in told if record.event != "nonsense"}
        for reply_id in ("r", "late"):
            values = (reply_id, POLICY, BASE, 0, NOW, "[1, 2, 3]", "[4, 5]", texts[reply_id].event)
            db.execute("INSERT INTO exchanges VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        fates = {
            "first": ("superseded", "by second", POLICY, BASE),
            "second": ("joined", None, POLICY, BASE),
            "waiting": ("pending", None, None, None),
            "given up": ("dropped", "no_exchange", None, None),
            "given up too early": ("dropped", "no_exchange", None, None),
            "bad": ("dropped", "malformed", None, None),
            "back": ("retracted", None, POLICY, BASE),
        }
        first_told = {
            event.id: place for place, event in reversed(list(enumerate(EVENTS[2:], 1))) if event != "nonsense"
        }
        said = {event.id: event for event in EVENTS if getattr(event, "type", "") == "feedback"}
        for feedback_id, (status, reason, policy, base) in fates.items():
            event = said[feedback_id]
            db.execute(
                "INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?, ?, ?, ?, NULL, NULL, NULL)",
                (
                    *(event.id, first_told[event.id], event.kind, event.content.user, event.aspect, event.value),
                    *(event.at, event.body, event.reply_ids[0], event.to_json(), status, reason, policy, base),
                ),
            )
            db.execute("INSERT INTO stories (feedback_id, status, at) VALUES (?, ?, ?)", (feedback_id, status, NOW))
        db.execute("INSERT INTO awaited VALUES ('nowhere', 'waiting')")
        db.execute("INSERT INTO retractions VALUES ('back')")
        db.execute("INSERT INTO parked VALUES (?, 99, '{\"schema\": 99}')", (FEEDBACK,))
        db.execute("INSERT INTO counters VALUES ('duplicate', 1), ('malformed', 1), ('newer_schema', 1)")
        db.execute("INSERT INTO offsets VALUES (?, 2), (?, 99)", (EXCHANGES, FEEDBACK))
        db.execute("UPDATE feedback SET learned_in = 1 WHERE id = 'second'")
        db.execute(
            "INSERT INTO updates VALUES (1, 'released', 1, 2, 0, ?, 1, 1, NULL, '{}', '{}')",
            (json.dumps({FEEDBACK: 4}),),
        )
        db.commit()


def whole(path: Path) -> list[str]:
    """Everything in a file, its schema number included."""
    with closing(sqlite3.connect(path)) as db:
        return [*db.iterdump(), str(db.execute("PRAGMA user_version").fetchone())]


def test_a_state_of_schema_1_becomes_what_the_log_makes_anew(tmp_path: Path):
    file_of_schema_1(tmp_path / "old.db")
    migrated = State(tmp_path / "old.db", policy=POLICY, base=BASE)
    anew = State(tmp_path / "new.db", policy=POLICY, base=BASE)
    anew.absorb([*records(*EVENTS), *records('{"schema": 99}', first=99)], NOW)
    for state in (migrated, anew):
        state.give_up_waiting(NOW - 50, NOW)
    assert migrated.digest() == anew.digest()
    assert feedback_counts(migrated)["by_status"] == {
        "dropped": 2, "joined": 2, "pending": 1, "retracted": 1, "superseded": 1,
    }  # fmt: skip
    assert migrated.offsets() == {EXCHANGES: 2, FEEDBACK: 99}
    assert migrated.judgement_count(fresh=True) == 1  # "given up too early"; "second" was learned from
    last = Ledger(migrated).last()
    assert last is not None
    assert (last.number, last.status, last.version) == (1, "released", 1)
    assert Ledger(migrated).of_this_base()
    migrated.close()
    anew.close()


def test_a_migrated_state_goes_on_as_one_made_anew(tmp_path: Path):
    file_of_schema_1(tmp_path / "old.db")
    with closing(State(tmp_path / "old.db", policy=POLICY, base=BASE)) as state:
        state.absorb(records(exchange("nowhere"), exchange("lost"), retraction("first"), first=100), NOW)
        rows = dict(state.db.execute("SELECT id, status FROM feedback"))
    assert rows == {
        "first": "retracted", "second": "joined", "waiting": "joined", "given up": "joined",
        "given up too early": "joined", "bad": "dropped", "back": "retracted",
    }  # fmt: skip


def test_a_migrated_file_has_the_tables_of_a_new_one(tmp_path: Path):
    file_of_schema_1(tmp_path / "old.db")
    tables = []
    for name in ("old.db", "new.db"):
        with closing(open_state(tmp_path / name)) as db:
            tables.append(sorted(db.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL")))
            assert db.execute("PRAGMA user_version").fetchone() == (STATE_SCHEMA,)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert tables[0] == tables[1]


def test_what_an_older_heed_did_not_learn_from_is_learned_from(tmp_path: Path):
    events = (
        exchange("r"), exchange("q"), exchange("silent", reply_ids=()),
        feedback("ranking", "r", "q", kind="ranking"), feedback("speechless", "r", "silent", kind="ranking"),
        feedback("aspect", "r", aspect="safe"), feedback("comment", "r", kind="comment"),
    )  # fmt: skip
    digests = []
    for name in ("old", "new"):
        with closing(State(tmp_path / f"{name}.db", policy=POLICY, base=BASE)) as state:
            state.absorb(records(*events), NOW)
            if name == "old":  # as schema 2 had it
                state.db.execute("UPDATE feedback SET untrained = iif(aspect = 'safe', 'aspect', 'kind')")
                state.db.execute("ALTER TABLE feedback DROP COLUMN left_out")
                state.db.execute("ALTER TABLE updates DROP COLUMN parent")
                state.db.executescript("DROP TABLE learned_by; PRAGMA user_version = 2")
    for name in ("old", "new"):
        with closing(State(tmp_path / f"{name}.db", policy=POLICY, base=BASE)) as state:
            assert {one.feedback_id for one in state.judgements()} == {"ranking", "aspect"}
            digests.append(state.digest())
    assert digests[0] == digests[1]


def test_of_two_bases_that_had_learned_only_the_last_ones_updates_are_known(tmp_path: Path):
    first, last = exchange("r1", base="first"), exchange("r2", base="last")
    path = tmp_path / "old.db"
    with closing(State(path, policy=POLICY, base="last")) as state:
        state.absorb(
            records(first, last, feedback("f1", "r1"), feedback("f2", "r2"), feedback("f3", "r2", user="bob")), NOW
        )
        state.db.execute("UPDATE feedback SET learned_in = 1 WHERE id = 'f1'")  # as schema 3 had it
        state.db.execute("UPDATE feedback SET learned_in = 2 WHERE id = 'f2'")
        state.db.execute("ALTER TABLE feedback DROP COLUMN left_out")
        state.db.execute("ALTER TABLE updates DROP COLUMN parent")
        state.db.execute("INSERT INTO updates VALUES (2, 'released', 1, 2, 7, '{}', 1, 8, NULL, '{}', '{}')")
        state.db.executescript("DROP TABLE learned_by; PRAGMA user_version = 3")
    with closing(State(path, policy=POLICY, base="last")) as state:
        assert Ledger(state).of_this_base()
        assert dict(state.db.execute("SELECT id, learned_in FROM feedback")) == {"f1": None, "f2": 2, "f3": None}
        assert Ledger(state)[2].parent == 7


def test_a_migration_that_breaks_off_anywhere_leaves_the_old_state_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "old.db"
    file_of_schema_1(path)
    before = whole(path)
    statements = statefile.SCRIPTS[1].split(";")
    for number in range(len(statements)):
        with monkeypatch.context() as broken:
            script = ";".join(statements[:number]) + "; SELECT * FROM nowhere;"
            broken.setattr(statefile, "SCRIPTS", (statefile.SCRIPTS[0], script))
            with pytest.raises(sqlite3.OperationalError, match="nowhere"):
                open_state(path)
        assert whole(path) == before
    open_state(path).close()


def test_a_migration_that_is_killed_is_done_by_the_next_start(tmp_path: Path):
    program = """
import os, pathlib, signal, sqlite3, sys
from learner import statefile

def deadly(*arguments, connect=sqlite3.connect, **named):
    db = connect(*arguments, **named)
    db.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return db

statefile.sqlite3.connect = deadly
statements = statefile.SCRIPTS[1].split(";")
statefile.SCRIPTS = (statefile.SCRIPTS[0], ";".join([*statements[:-1], " SELECT die()", statements[-1]]))
statefile.open_state(pathlib.Path(sys.argv[1]))
"""
    path = tmp_path / "old.db"
    file_of_schema_1(path)
    before = whole(path)
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    assert whole(path) == before
    with closing(open_state(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (STATE_SCHEMA,)


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "state.db"
    open_state(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {STATE_SCHEMA + 1}")
    before = whole(path)
    with pytest.raises(StateError, match=rf"reads up to {STATE_SCHEMA}.*--rebuild"):
        open_state(path)
    assert whole(path) == before
