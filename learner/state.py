"""What the learner knows: joined exchanges and feedback, and how far it has read, in one SQLite file.

A batch of events and the offsets behind it are one transaction, so that a kill at any moment leaves every event either
wholly absorbed or not read at all: each feedback counts exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from feedback.board import Story
from feedback.events import SCHEMA
from feedback.keeping import EVERYTHING, Keep
from feedback.log import Record
from learner.joining import Joiner
from learner.judgement import Judgement
from learner.material import LEARNED_FROM, judgements, live, prompts
from learner.statefile import open_state


@dataclass(frozen=True, slots=True)
class StoryLine:
    """One step of one feedback's story, and the row that holds it."""

    row: int
    feedback_id: str
    step: Story


# of the feedback that is learned from: what starts an update when enough of it is new
STARTS = (
    "f.kind IN ('thumb', 'rating', 'preference') AND f.learned_in IS NULL"
    " AND f.aspect NOT IN (SELECT value FROM json_each(:weightless))"
)


class State:
    """The joined material of one policy, for the base that learns from it now. Not for several threads at once."""

    def __init__(
        self, path: Path, *, policy: str, base: str, keep: Keep = EVERYTHING, weightless: Sequence[str] = ()
    ) -> None:
        """Open or make the state file. `base` is the fingerprint of the base model; what is said of `weightless` aspects
        starts no update. Raises StateError."""
        self.db = open_state(path)
        self.line = {"policy": policy, "base": base, "weightless": json.dumps(weightless)}
        self.kept = keep
        self._take_parked()
        self._join_what_is_whole()

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
            joiner = Joiner(db, now, self.kept.age_s)
            reached = dict(self.offsets())
            new = 0
            for record in records:
                if record.offset > reached.get(record.partition, 0):
                    joiner.take(record)
                    reached[record.partition] = record.offset
                    new += 1
            db.executemany("INSERT OR REPLACE INTO offsets VALUES (?, ?)", reached.items())
        return new

    def offsets(self) -> Mapping[str, int]:
        """Partition → the last offset absorbed; one never read is absent."""
        return dict(self.db.execute("SELECT partition, last FROM offsets"))

    def give_up_waiting(self, accepted_before: float, now: float) -> int:
        """Drop feedback accepted before a time whose exchange has not come, and say how many. If it comes late, it joins.

        Only right when the exchanges' topic has been read to its end: else the exchange may simply be unread.
        """
        with self.transaction() as db:
            late = db.execute(
                "SELECT id FROM feedback WHERE status = 'pending' AND at < ?", (accepted_before,)
            ).fetchall()
            joiner = Joiner(db, now)
            for (feedback_id,) in late:
                joiner.move(feedback_id, "dropped", "no_exchange")
        return len(late)

    def keep(self, now: float, grace_s: float, most: int = 1000) -> bool:
        """Let go of at most so many each of feedback and exchanges that are older, or more, than is kept; true if there is more.

        Exchanges that kept feedback speaks of stay, and all others for another `grace_s` seconds, in which feedback on
        them may come; so do retractions. Only right when the log has been read to its end: else that feedback may
        simply be unread. What old feedback stood before takes its place and waits anew: `give_up_waiting` comes after.
        """
        if self.kept == EVERYTHING:
            return False
        fits = self._oldest_that_fits()
        too_old, unspoken_of = max(now - self.kept.age_s, fits), max(now - self.kept.age_s - grace_s, fits)
        with self.transaction() as db:
            joiner = Joiner(db, now, self.kept.age_s)
            joiner.count("too_old", db.execute("DELETE FROM repeats WHERE at < ?", (too_old,)).rowcount)
            old = db.execute("SELECT id FROM feedback WHERE at < ? ORDER BY at LIMIT ?", (too_old, most)).fetchall()
            for (feedback_id,) in old:
                joiner.let_go(feedback_id)
            gone = db.execute(
                "DELETE FROM exchanges WHERE reply_id IN (SELECT reply_id FROM exchanges e WHERE at < ? AND NOT EXISTS"
                " (SELECT 1 FROM about a WHERE a.reply_id = e.reply_id) AND reply_id NOT IN"
                " (SELECT reply.value FROM repeats r, json_each(r.event, '$.reply_ids') reply) ORDER BY at LIMIT ?)",
                (unspoken_of, most),
            ).rowcount
            db.execute("DELETE FROM retractions WHERE at < ? AND id NOT IN (SELECT id FROM feedback)", (unspoken_of,))
        return max(len(old), gone) == most

    def highest_version(self) -> int:
        """Of this policy's versions that spoke, of whatever base."""
        query = "SELECT coalesce(max(version), 0) FROM exchanges WHERE policy = :policy"
        highest: int = self.db.execute(query, self.line).fetchone()[0]
        return highest

    def judgement_count(self, *, fresh: bool) -> int:
        """All that is learned from now; with `fresh`, thumbs, ratings and preferences that no update of this base has learned
        from yet."""
        return self._count(f"AND {STARTS}" if fresh else "")

    def oldest_fresh_at(self) -> float | None:
        """When the oldest fresh judgement was accepted."""
        query = f"SELECT min(at) FROM feedback f WHERE {LEARNED_FROM} AND {STARTS}"
        at: float | None = self.db.execute(query, self.line).fetchone()[0]
        return at

    def judgements(self, most: int = -1) -> list[Judgement]:
        """What the reward model learns from now, in the order in which it was given; with `most`, the newest so many.

        Signals come last there: a page may send one with every click.
        """
        return judgements(self.db, self.line, most)

    def prompts(self, most: int) -> list[tuple[int, ...]]:
        """Token ids of the distinct prompts that people sent to this base, the newest first, at most so many."""
        return prompts(self.db, self.line, most)

    def untold(self, most: int = 1000) -> list[StoryLine]:
        """Lines of stories that the board has not been told yet."""
        rows = self.db.execute(
            "SELECT rowid, feedback_id, status, at, in_update, version, reason FROM stories WHERE told = 0 LIMIT ?",
            (most,),
        )
        return [StoryLine(row, feedback_id, Story(*step)) for row, feedback_id, *step in rows]

    def mark_told(self, lines: Sequence[StoryLine]) -> None:
        """Note what the board was told. Of feedback that was too old nothing else is kept."""
        rows = [(line.row,) for line in lines]
        with self.transaction() as db:
            db.executemany("UPDATE stories SET told = 1 WHERE rowid = ?", rows)
            db.executemany("DELETE FROM stories WHERE rowid = ? AND reason = 'too_old'", rows)

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
            f" WHERE s.status = 'in_version' AND f.fresh_s IS NULL AND {live('e')}"
        ).fetchall()
        seconds: dict[str, float] = {}
        for feedback_id, accepted, version in waiting:
            served = min((at for other, at in activations.items() if other >= version), default=None)
            if served is not None:
                seconds[feedback_id] = max(0.0, served - accepted)
        with self.transaction() as db:
            db.executemany("UPDATE feedback SET fresh_s = ? WHERE id = ?", [(s, id_) for id_, s in seconds.items()])
        return list(seconds.values())

    def counted(self) -> dict[str, int]:
        """What was read and left no feedback of its own in the state, by name; and how much was joined `late`."""
        repeats = "FROM repeats r JOIN feedback f ON f.id = r.feedback_id WHERE r.body"
        rows = self.db.execute(
            f"SELECT name, count FROM counters UNION ALL SELECT 'duplicate', count(*) {repeats} = f.body"
            f" UNION ALL SELECT 'conflict', count(*) {repeats} != f.body"
        )
        totals: Counter[str] = Counter()
        for name, count in rows:
            totals[name] += count
        return dict(+totals)

    def digest(self) -> str:
        """One digest of every feedback's fate and of what was counted, whatever the order it was absorbed in.

        Whether an exchange came in time or late is no part of it.
        """
        fates = self.db.execute(
            "SELECT id, kind, user, aspect, value, at, reply_id, other_id, status, reason, policy, base, untrained"
            " FROM feedback"
        )
        counted = [item for item in self.counted().items() if item[0] != "late"]
        lines = sorted(json.dumps(row) for rows in (fates, counted) for row in rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _oldest_that_fits(self) -> float:
        """The time from which on all exchanges and feedback fit the size that is kept."""
        sizes = "SELECT at, size FROM exchanges UNION ALL SELECT at, size FROM feedback"
        if self.db.execute(f"SELECT coalesce(sum(size), 0) FROM ({sizes})").fetchone()[0] <= self.kept.size:
            return -math.inf
        newer = f"SELECT at, sum(size) OVER (ORDER BY at DESC) AS total FROM ({sizes})"
        at: float = self.db.execute(f"SELECT max(at) FROM ({newer}) WHERE total > ?", (self.kept.size,)).fetchone()[0]
        return math.nextafter(at, math.inf)

    def _take_parked(self) -> None:
        """Events parked by an older Heed that this one can read take their place at last."""
        parked = self.db.execute("SELECT partition, place, event FROM parked ORDER BY place").fetchall()
        readable = [row for row in parked if json.loads(row[2])["schema"] <= SCHEMA]
        if not readable:
            return
        with self.transaction() as db:
            joiner = Joiner(db, time.time(), self.kept.age_s)
            for partition, place, event in readable:
                db.execute("DELETE FROM parked WHERE partition = ? AND place = ?", (partition, place))
                joiner.count("newer_schema", -1)
                joiner.take(Record(partition.partition("/")[0], partition, place, "", event))

    def _join_what_is_whole(self) -> None:
        """Feedback that an older Heed gave up, though its exchange came late, is joined."""
        with self.transaction() as db:
            joiner = Joiner(db, time.time(), self.kept.age_s)
            waiting = db.execute("SELECT id FROM feedback WHERE status = 'pending'").fetchall()
            for (feedback_id,) in waiting:
                joiner.supersede(feedback_id)
                joiner.join_if_whole(feedback_id)

    def _count(self, condition: str) -> int:
        query = f"SELECT count(*) FROM feedback f WHERE {LEARNED_FROM} {condition}"
        number: int = self.db.execute(query, self.line).fetchone()[0]
        return number
