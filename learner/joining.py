"""What one event of the log does to the learner's state: exchanges and feedback find each other, whichever comes first.

Each feedback is in exactly one status at any time:

    pending ──its exchanges are there──▶ joined
       └──────they did not come────────▶ dropped ──they came late──▶ joined

and from any of them it may become `superseded` (by a later opinion of the same person on the same reply and aspect) or
`retracted` (by who gave it). What status that is depends on the events alone, not on the order in which they come: only
the events of one key come in order, and any may come twice.

Everything here runs inside the caller's transaction, which also moves the offsets.
"""

from __future__ import annotations

import json
import math
import sqlite3
from itertools import pairwise

from pydantic import ValidationError

from feedback.events import FEEDBACK, Exchange, Feedback, NewerSchema, Retraction, parse_event
from feedback.log import Record

TRAINABLE = ("thumb", "rating", "preference", "ranking", "correction", "signal")
OPINIONS = ("thumb", "rating")
_REPLIES = {"preference": (2, 2), "ranking": (2, 1_000_000)}


class Joiner:
    """Takes events one by one, each partition's in order, into the tables of an open transaction."""

    def __init__(self, db: sqlite3.Connection, now: float, keep_s: float = math.inf) -> None:
        """`keep_s`: seconds that feedback is kept after it was given."""
        self.db = db
        self.now = now
        self.keep_s = keep_s

    def take(self, record: Record) -> None:
        """Absorb one record. What a newer Heed wrote is parked, what is no event of ours is counted; nothing stops."""
        try:
            event = parse_event(record.event)
        except NewerSchema:
            self.db.execute(
                "INSERT OR IGNORE INTO parked VALUES (?, ?, ?)", (record.partition, record.offset, record.event)
            )
            self.count("newer_schema")
            return
        except ValidationError:
            self.count("malformed")
            return
        match event:
            case Exchange():
                self.take_exchange(event, record.event)
            case Feedback():
                self.take_feedback(event, record)
            case Retraction():
                self.take_retraction(event)

    def take_exchange(self, exchange: Exchange, text: str) -> None:
        """Keep the exchange, and join what waited for it. The same exchange twice is the same exchange."""
        prompt_ids, reply_ids = json.dumps(exchange.content.prompt_ids), json.dumps(exchange.content.reply_ids)
        self.db.execute(
            "INSERT OR IGNORE INTO exchanges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                exchange.id,
                exchange.policy,
                exchange.base,
                exchange.version,
                exchange.at,
                prompt_ids,
                reply_ids,
                text,
                len(text) + len(prompt_ids) + len(reply_ids),
            ),
        )
        waiting = self.db.execute("SELECT feedback_id FROM about WHERE reply_id = ?", (exchange.id,)).fetchall()
        for (feedback_id,) in waiting:
            self.join_if_whole(feedback_id)

    def take_feedback(self, feedback: Feedback, record: Record) -> None:
        """Keep the feedback in the status it deserves. Of all that is said under one id, the earliest counts."""
        if feedback.at < self.now - self.keep_s:
            self.count("too_old")
            self.tell(feedback.id, "dropped", "too_old")
            return
        known = self.db.execute(
            "SELECT at, body, partition, place FROM feedback WHERE id = ?", (feedback.id,)
        ).fetchone()
        if known is None:
            self.put(feedback, record)
        elif known <= (feedback.at, feedback.body, record.partition, record.offset):
            self.db.execute(
                "INSERT INTO repeats VALUES (?, ?, ?, ?, ?, ?)",
                (record.partition, record.offset, feedback.id, feedback.at, feedback.body, record.event),
            )
        else:
            columns = "partition, place, id, at, body, event"
            self.db.execute(f"INSERT INTO repeats SELECT {columns} FROM feedback WHERE id = ?", (feedback.id,))
            self.replace(feedback, record)

    def take_retraction(self, retraction: Retraction) -> None:
        """What it names stops counting, now or (where it has not been read yet) on arrival."""
        self.db.execute(
            "INSERT INTO retractions VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET at = max(at, ?2)",
            (retraction.id, retraction.at),
        )
        self.retract_if_named(retraction.id)

    def put(self, feedback: Feedback, record: Record) -> None:
        """Feedback whose id the state does not hold."""
        first, other = (*feedback.reply_ids, None, None)[:2]
        self.db.execute(
            "INSERT INTO feedback (id, partition, place, kind, user, aspect, value, at, body, reply_id, other_id, event,"
            " size, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'pending')",
            (
                feedback.id,
                record.partition,
                record.offset,
                feedback.kind,
                feedback.content.user,
                feedback.aspect,
                feedback.value,
                feedback.at,
                feedback.body,
                first or "",
                other,
                record.event,
                len(record.event),
            ),
        )
        if not _well_formed(feedback):
            self.move(feedback.id, "dropped", "malformed")
            return
        pairs = [(feedback.id, reply_id) for reply_id in feedback.reply_ids]
        self.db.executemany("INSERT INTO about VALUES (?, ?)", pairs)
        self.retract_if_named(feedback.id)
        self.join_if_whole(feedback.id)
        self.supersede(feedback.id)

    def retract_if_named(self, feedback_id: str) -> None:
        """Retract feedback that a retraction names; one that was too old to be kept when it was given names it no more."""
        query = "SELECT 1 FROM retractions r JOIN feedback f USING (id) WHERE id = ? AND r.at >= f.at - ?"
        if self.db.execute(query, (feedback_id, self.keep_s)).fetchone():
            self.move(feedback_id, "retracted")

    def replace(self, feedback: Feedback, record: Record) -> None:
        """Feedback that goes before what the state holds under its id. What was learned from the same words stays so."""
        columns = "SELECT body, learned_in, left_out, fresh_s FROM feedback WHERE id = ?"
        body, *learned = self.db.execute(columns, (feedback.id,)).fetchone()
        self.remove(feedback.id)
        self.put(feedback, record)
        if body == feedback.body:
            same = "UPDATE feedback SET learned_in = ?, left_out = ?, fresh_s = ? WHERE id = ?"
            self.db.execute(same, (*learned, feedback.id))

    def remove(self, feedback_id: str) -> None:
        """The feedback leaves the state with its story, as if it had never come: what it superseded counts again."""
        others = self.opinions(feedback_id)
        for table, column in (("feedback", "id"), ("about", "feedback_id"), ("stories", "feedback_id")):
            self.db.execute(f"DELETE FROM {table} WHERE {column} = ?", (feedback_id,))
        for other_id in others:
            if other_id != feedback_id:
                self.supersede(other_id)
                break

    def let_go(self, feedback_id: str) -> None:
        """The feedback is too old to be kept. What is younger under its id, if anything, takes its place."""
        self.remove(feedback_id)
        self.count("too_old")
        younger = self.db.execute(
            "SELECT partition, place, event FROM repeats WHERE feedback_id = ? ORDER BY at, body, partition, place LIMIT 1",
            (feedback_id,),
        ).fetchone()
        if younger is not None:
            partition, place, event = younger
            self.db.execute("DELETE FROM repeats WHERE partition = ? AND place = ?", (partition, place))
            self.take(Record(FEEDBACK, partition, place, "", event))

    def supersede(self, feedback_id: str) -> None:
        """Of one person's thumbs and ratings of one reply and aspect, each is superseded by the next; the last counts."""
        ids = self.opinions(feedback_id)
        for earlier, later in pairwise(ids):
            self.move(earlier, "superseded", f"by {later}")
        if ids:
            self.count_again(ids[-1])

    def opinions(self, feedback_id: str) -> list[str]:
        """All opinions of that person on that reply and aspect, the last one last; none where it is no person's opinion.

        Those of one partition in its order, whatever the servers' clocks say; between partitions by the time.
        """
        rows = self.db.execute(
            "SELECT id FROM feedback WHERE (reply_id, user, aspect) ="
            " (SELECT reply_id, user, aspect FROM feedback WHERE id = ? AND kind IN (?, ?))"
            " AND kind IN (?, ?) AND reason IS NOT 'malformed'"
            " ORDER BY max(at) OVER (PARTITION BY partition ORDER BY place), partition, place",
            (feedback_id, *OPINIONS, *OPINIONS),
        )
        return [opinion_id for (opinion_id,) in rows]

    def move(self, feedback_id: str, status: str, reason: str | None = None) -> None:
        """Move feedback to a status in which it does not count. Of what is retracted or malformed nothing else is said."""
        moved = self.db.execute(
            "UPDATE feedback SET status = ?1, reason = ?2, policy = NULL, base = NULL, untrained = NULL WHERE id = ?3"
            " AND (status, reason) IS NOT (?1, ?2) AND status != 'retracted' AND reason IS NOT 'malformed'",
            (status, reason, feedback_id),
        ).rowcount
        if moved:
            self.tell(feedback_id, status, reason)

    def count_again(self, feedback_id: str) -> None:
        """Feedback that is the last opinion after all, where what superseded it is gone."""
        superseded = "UPDATE feedback SET status = 'pending', reason = NULL WHERE id = ? AND status = 'superseded'"
        if self.db.execute(superseded, (feedback_id,)).rowcount:
            self.untell(feedback_id, "superseded")
            self.join_if_whole(feedback_id)

    def join_if_whole(self, feedback_id: str) -> None:
        """Join feedback that waits, or was given up, once its exchanges are all there.

        An exchange that was too old to be kept when the feedback was given is not there, even where it still is.
        """
        row = self.db.execute(
            "SELECT kind, at, status FROM feedback WHERE id = ? AND (status = 'pending' OR reason = 'no_exchange')",
            (feedback_id,),
        ).fetchone()
        if row is None:
            return
        kind, at, status = row
        rows = self.db.execute(
            "SELECT e.policy, e.base, e.reply_ids FROM about a LEFT JOIN exchanges e"
            " ON e.reply_id = a.reply_id AND e.at >= ? WHERE a.feedback_id = ?",
            (at - self.keep_s, feedback_id),
        ).fetchall()
        policies, bases, replies = ({row[column] for row in rows} for column in range(3))
        if None in policies:
            return
        self.db.execute(
            "UPDATE feedback SET status = 'joined', reason = NULL, policy = ?, base = ?, untrained = ? WHERE id = ?",
            (_only(policies), _only(bases), _untrained(kind, replies), feedback_id),
        )
        if status == "dropped":
            self.count("late")
            self.untell(feedback_id, "dropped")
        self.tell(feedback_id, "joined")

    def tell(self, feedback_id: str, status: str, reason: str | None = None) -> None:
        """Add a line to the feedback's story, which the board is told after the transaction."""
        self.db.execute(
            "INSERT OR REPLACE INTO stories (feedback_id, status, at, reason) VALUES (?, ?, ?, ?)",
            (feedback_id, status, self.now, reason),
        )

    def untell(self, feedback_id: str, status: str) -> None:
        """Take a line of the story back. The board, if it was told, sees that what was joined later counts again."""
        self.db.execute("DELETE FROM stories WHERE feedback_id = ? AND status = ?", (feedback_id, status))

    def count(self, name: str, times: int = 1) -> None:
        """Count events that left no row of their own."""
        self.db.execute(
            "INSERT INTO counters VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET count = count + ?2", (name, times)
        )


def _well_formed(feedback: Feedback) -> bool:
    """The server's checks once more: the log may have been written by another hand."""
    fewest, most = _REPLIES.get(feedback.kind, (1, 1))
    if not fewest <= len(feedback.reply_ids) <= most or len(set(feedback.reply_ids)) != len(feedback.reply_ids):
        return False
    if feedback.kind == "thumb":
        return feedback.value in (0, 1)
    if feedback.kind == "rating":
        return feedback.value in (1, 2, 3, 4, 5)
    return True


def _only(values: set[str]) -> str | None:
    """The one value, or None where replies of several policies or bases are compared."""
    return next(iter(values)) if len(values) == 1 else None


def _untrained(kind: str, replies: set[str]) -> str | None:
    """Why the reward model does not learn from this feedback; None where it does."""
    if kind not in TRAINABLE:
        return "kind"
    if "[]" in replies:
        return "empty_reply"
    return None
