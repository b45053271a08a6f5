"""What the learner knows: joined exchanges and feedback, and how far it has read, in one SQLite file.

A batch of events and the offsets behind it are one transaction, so that a kill at any moment leaves every event either
wholly absorbed or not read at all: each feedback counts exactly once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from feedback.board import Story
from feedback.events import SCHEMA
from feedback.log import Record
from learner.joining import Joiner
from learner.statefile import open_state


@dataclass(frozen=True, slots=True)
class Sample:
    """One reply as it was served."""

    reply_id: str
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """One live thumb, rating or preference on replies of this base and policy.

    `value` is 1 or 0 for a thumb, 1 to 5 for a rating, 1 for a preference, whose `reply` was chosen over `other`.
    """

    feedback_id: str
    kind: str
    user: str | None
    value: float
    reply: Sample
    other: Sample | None
    at: float


@dataclass(frozen=True, slots=True)
class StoryLine:
    """One step of one feedback's story, and the row that holds it."""

    row: int
    feedback_id: str
    step: Story


# of the feedback in table f: it counts now, and the reward model of this policy and base learns from it
LEARNED_FROM = "f.status = 'joined' AND f.untrained IS NULL AND f.policy = :policy AND f.base = :base"


# of the exchange in table e: a version of ours said it (Exchange.live)
LIVE = (
    "NOT EXISTS (SELECT 1 FROM exchanges AS i INDEXED BY imported"
    " WHERE i.reply_id = e.reply_id AND json_extract(i.event, '$.source') = 'imported')"
)


class State:
    """The joined material of one policy over one base. Not for several threads at once."""

    def __init__(self, path: Path, *, policy: str, base: str) -> None:
        """Open or make the state file. `base` is the fingerprint of the base model. Raises StateError."""
        self.db = open_state(path)
        self.line = {"policy": policy, "base": base}
        self._take_parked()

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it; durable once left."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # some failures roll back by themselves
                self.db.execute("ROLLBACK")
            raise

    def absorb(self, records: Sequence[Record], now: float) -> int:
        """Take records in, with the offsets behind them; returns how many were new. Known ones are passed over."""
        with self.transaction() as db:
            joiner = Joiner(db, now)
            reached = dict(self.offsets())
            new = 0
            for record in records:
                if record.offset > reached.get(record.topic, 0):
                    joiner.take(record)
                    reached[record.topic] = record.offset
                    new += 1
            db.executemany("INSERT OR REPLACE INTO offsets VALUES (?, ?)", reached.items())
        return new

    def offsets(self) -> Mapping[str, int]:
        """Topic to the last offset absorbed; a topic never read is absent."""
        return dict(self.db.execute("SELECT topic, last FROM offsets"))

    def give_up_waiting(self, accepted_before: float, now: float) -> int:
        """Drop feedback accepted before a time whose exchange has not come, and say how many.

        Only right when the exchanges' topic has been read to its end: else the exchange may simply be unread.
        """
        with self.transaction() as db:
            late = db.execute(
                "SELECT id FROM feedback WHERE status = 'pending' AND at < ?", (accepted_before,)
            ).fetchall()
            joiner = Joiner(db, now)
            for (feedback_id,) in late:
                joiner.settle(feedback_id, "dropped", "no_exchange")
        return len(late)

    def judgement_count(self, *, fresh: bool) -> int:
        """Judgements that count now; with `fresh`, those that no update has learned from yet."""
        return self._count("AND learned_in IS NULL" if fresh else "")

    def oldest_fresh_at(self) -> float | None:
        """When the oldest fresh judgement was accepted."""
        query = f"SELECT min(at) FROM feedback f WHERE {LEARNED_FROM} AND learned_in IS NULL"
        at: float | None = self.db.execute(query, self.line).fetchone()[0]
        return at

    def judgements(self, most: int = -1) -> list[Judgement]:
        """The judgements that count now, in log order; with `most`, the newest so many."""
        rows = self.db.execute(
            "SELECT f.id, f.kind, f.user, f.value, f.at, e.reply_id, e.prompt_ids, e.reply_ids, e.version,"
            " o.reply_id, o.prompt_ids, o.reply_ids, o.version"
            " FROM feedback f JOIN exchanges e ON e.reply_id = f.reply_id"
            " LEFT JOIN exchanges o ON o.reply_id = f.other_id"
            f" WHERE {LEARNED_FROM} ORDER BY f.place DESC LIMIT :most",
            {**self.line, "most": most},
        ).fetchall()
        return [
            Judgement(id_, kind, user, 1.0 if value is None else value, _sample(*pair[:4]), _other(*pair[4:]), at)
            for id_, kind, user, value, at, *pair in reversed(rows)
        ]

    def prompts(self, most: int) -> list[tuple[int, ...]]:
        """Token ids of the distinct prompts that people sent, the newest first, at most so many."""
        rows = self.db.execute(
            "SELECT prompt_ids FROM exchanges WHERE policy = :policy AND base = :base"
            " GROUP BY prompt_ids ORDER BY max(rowid) DESC LIMIT :most",
            {**self.line, "most": most},
        )
        return [tuple(json.loads(ids)) for (ids,) in rows]

    def untold(self, most: int = 1000) -> list[StoryLine]:
        """Lines of stories that the board has not been told yet."""
        rows = self.db.execute(
            "SELECT rowid, feedback_id, status, at, in_update, version, reason FROM stories WHERE told = 0 LIMIT ?",
            (most,),
        )
        return [StoryLine(row, feedback_id, Story(*step)) for row, feedback_id, *step in rows]

    def mark_told(self, lines: Sequence[StoryLine]) -> None:
        with self.transaction() as db:
            db.executemany("UPDATE stories SET told = 1 WHERE rowid = ?", [(line.row,) for line in lines])

    def tell_all_again(self) -> None:
        """For a board that was emptied: every story counts as untold."""
        with self.transaction() as db:
            db.execute("UPDATE stories SET told = 0")

    def note_served(self, activations: Mapping[int, float]) -> list[float]:
        """Seconds from acceptance to being served of each judgement that got there since the last call.

        `activations` is when each version was first served. A version that its successor overtook was served with that.
        What was imported is none of them: it was said long before it was accepted.
        """
        waiting = self.db.execute(
            "SELECT f.id, f.at, s.version FROM stories s JOIN feedback f ON f.id = s.feedback_id"
            " JOIN exchanges e ON e.reply_id = f.reply_id"
            f" WHERE s.status = 'in_version' AND f.fresh_s IS NULL AND {LIVE}"
        ).fetchall()
        seconds: dict[str, float] = {}
        for feedback_id, accepted, version in waiting:
            served = min((at for other, at in activations.items() if other >= version), default=None)
            if served is not None:
                seconds[feedback_id] = max(0.0, served - accepted)
        with self.transaction() as db:
            db.executemany("UPDATE feedback SET fresh_s = ? WHERE id = ?", [(s, id_) for id_, s in seconds.items()])
        return list(seconds.values())

    def digest(self) -> str:
        """One digest of every feedback's fate and of what was counted, whatever the order it was absorbed in."""
        fates = self.db.execute(
            "SELECT id, kind, user, aspect, value, reply_id, other_id, status, reason FROM feedback"
        )
        counted = self.db.execute("SELECT name, count FROM counters")
        lines = sorted(json.dumps(row) for rows in (fates, counted) for row in rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _take_parked(self) -> None:
        """Events parked by an older Heed that this one can read take their place at last."""
        parked = self.db.execute("SELECT topic, place, event FROM parked ORDER BY place").fetchall()
        readable = [row for row in parked if json.loads(row[2])["schema"] <= SCHEMA]
        if not readable:
            return
        with self.transaction() as db:
            joiner = Joiner(db, now=0.0)
            for topic, place, event in readable:
                db.execute("DELETE FROM parked WHERE topic = ? AND place = ?", (topic, place))
                db.execute("UPDATE counters SET count = count - 1 WHERE name = 'newer_schema'")
                joiner.take(Record(topic, place, "", event))

    def _count(self, condition: str) -> int:
        query = f"SELECT count(*) FROM feedback f WHERE {LEARNED_FROM} {condition}"
        number: int = self.db.execute(query, self.line).fetchone()[0]
        return number


def _sample(reply_id: str, prompt_ids: str, reply_ids: str, version: int) -> Sample:
    return Sample(reply_id, tuple(json.loads(prompt_ids)), tuple(json.loads(reply_ids)), version)


def _other(reply_id: str | None, prompt_ids: str, reply_ids: str, version: int) -> Sample | None:
    return None if reply_id is None else _sample(reply_id, prompt_ids, reply_ids, version)
