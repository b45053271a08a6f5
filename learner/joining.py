"""What one event of the log does to the learner's state: exchanges and feedback find each other, whichever comes first.

Each feedback is in exactly one status at any time:

    pending ──its exchanges are there──▶ joined
       └──────they did not come────────▶ dropped

and from either of the first two it may become `superseded` (by a later opinion of the same person on the same reply and
aspect) or `retracted` (by who gave it).

Everything here runs inside the caller's transaction, which also moves the offsets.
"""

from __future__ import annotations

import json
import sqlite3

from pydantic import ValidationError

from feedback.events import Exchange, Feedback, NewerSchema, Retraction, parse_event
from feedback.log import Record

TRAINABLE = ("thumb", "rating", "preference")
OPINIONS = ("thumb", "rating")
_REPLIES = {"preference": (2, 2), "ranking": (2, 1_000_000)}


class Joiner:
    """Takes events one by one, in log order, into the tables of an open transaction."""

    def __init__(self, db: sqlite3.Connection, now: float) -> None:
        self.db = db
        self.now = now

    def take(self, record: Record) -> None:
        """Absorb one record. What a newer Heed wrote is parked, what is no event of ours is counted; nothing stops."""
        try:
            event = parse_event(record.event)
        except NewerSchema:
            self.db.execute(
                "INSERT OR IGNORE INTO parked VALUES (?, ?, ?)", (record.topic, record.offset, record.event)
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
                self.take_feedback(event, record.offset, record.event)
            case Retraction():
                self.take_retraction(event)

    def take_exchange(self, exchange: Exchange, text: str) -> None:
        """Keep the exchange, and join what waited for it. The same exchange twice is the same exchange."""
        content = exchange.content
        self.db.execute(
            "INSERT OR IGNORE INTO exchanges VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                exchange.id,
                exchange.policy,
                exchange.base,
                exchange.version,
                exchange.at,
                json.dumps(content.prompt_ids),
                json.dumps(content.reply_ids),
                text,
            ),
        )
        waiting = self.db.execute("SELECT feedback_id FROM awaited WHERE reply_id = ?", (exchange.id,)).fetchall()
        self.db.execute("DELETE FROM awaited WHERE reply_id = ?", (exchange.id,))
        for (feedback_id,) in waiting:
            self.join_if_whole(feedback_id)

    def take_feedback(self, feedback: Feedback, place: int, text: str) -> None:
        """Keep the feedback in the status it deserves. The first body under an id wins."""
        known = self.db.execute("SELECT body FROM feedback WHERE id = ?", (feedback.id,)).fetchone()
        if known is not None:
            self.count("duplicate" if known[0] == feedback.body else "conflict")
            return
        first, other = (*feedback.reply_ids, None, None)[:2]
        self.db.execute(
            "INSERT INTO feedback (id, place, kind, user, aspect, value, at, body, reply_id, other_id, event, status)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'pending')",
            (
                feedback.id,
                place,
                feedback.kind,
                feedback.content.user,
                feedback.aspect,
                feedback.value,
                feedback.at,
                feedback.body,
                first or "",
                other,
                text,
            ),
        )
        if not _well_formed(feedback):
            self.settle(feedback.id, "dropped", "malformed")
            return
        missing = [reply_id for reply_id in feedback.reply_ids if not self.has_exchange(reply_id)]
        self.db.executemany("INSERT INTO awaited VALUES (?, ?)", [(reply_id, feedback.id) for reply_id in missing])
        self.supersede(feedback)
        if self.db.execute("SELECT 1 FROM retractions WHERE id = ?", (feedback.id,)).fetchone():
            self.settle(feedback.id, "retracted", also="superseded")
        self.join_if_whole(feedback.id)

    def take_retraction(self, retraction: Retraction) -> None:
        """What it names stops counting, now or (where it has not been read yet) on arrival."""
        if self.db.execute("INSERT OR IGNORE INTO retractions VALUES (?)", (retraction.id,)).rowcount:
            self.settle(retraction.id, "retracted", also="superseded")

    def supersede(self, feedback: Feedback) -> None:
        """Of one person's thumbs and ratings of one reply and aspect, only the last in the log counts.

        By place rather than by arrival: an event parked for its newer schema may be taken after its successor.
        """
        user = feedback.content.user
        if user is None or feedback.kind not in OPINIONS:
            return
        opinions = self.db.execute(
            "SELECT id, place FROM feedback WHERE reply_id = ? AND user = ? AND aspect = ? AND kind IN (?, ?)"
            " AND status != 'dropped' ORDER BY place",
            (feedback.reply_ids[0], user, feedback.aspect, *OPINIONS),
        ).fetchall()
        last_id = opinions[-1][0]
        for opinion_id, _ in opinions[:-1]:
            self.settle(opinion_id, "superseded", reason=f"by {last_id}")

    def settle(self, feedback_id: str, status: str, reason: str | None = None, also: str = "") -> None:
        """Move feedback that counts or may yet, or that is in the status `also`, to one in which it does not count."""
        moved = self.db.execute(
            "UPDATE feedback SET status = ?, reason = ? WHERE id = ? AND status IN ('pending', 'joined', ?)",
            (status, reason, feedback_id, also),
        ).rowcount
        if moved:
            self.db.execute("DELETE FROM awaited WHERE feedback_id = ?", (feedback_id,))
            self.tell(feedback_id, status, reason)

    def join_if_whole(self, feedback_id: str) -> None:
        """Join pending feedback whose exchanges are all there."""
        if self.db.execute("SELECT 1 FROM awaited WHERE feedback_id = ?", (feedback_id,)).fetchone():
            return
        row = self.db.execute(
            "SELECT kind, aspect, event FROM feedback WHERE id = ? AND status = 'pending'", (feedback_id,)
        ).fetchone()
        if row is None:
            return
        kind, aspect, event = row
        reply_ids = json.loads(event)["reply_ids"]
        rows = [
            self.db.execute("SELECT policy, base, reply_ids FROM exchanges WHERE reply_id = ?", (reply_id,)).fetchone()
            for reply_id in reply_ids
        ]
        policies, bases, replies = ({row[column] for row in rows} for column in range(3))
        self.db.execute(
            "UPDATE feedback SET status = 'joined', reason = NULL, policy = ?, base = ?, untrained = ? WHERE id = ?",
            (_only(policies), _only(bases), _untrained(kind, aspect, replies), feedback_id),
        )
        self.tell(feedback_id, "joined")

    def has_exchange(self, reply_id: str) -> bool:
        return self.db.execute("SELECT 1 FROM exchanges WHERE reply_id = ?", (reply_id,)).fetchone() is not None

    def tell(self, feedback_id: str, status: str, reason: str | None = None) -> None:
        """Add a line to the feedback's story, which the board is told after the transaction."""
        self.db.execute(
            "INSERT OR REPLACE INTO stories (feedback_id, status, at, reason) VALUES (?, ?, ?, ?)",
            (feedback_id, status, self.now, reason),
        )

    def count(self, name: str) -> None:
        """Count an event that left no row of its own."""
        self.db.execute(
            "INSERT INTO counters VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET count = count + 1", (name,)
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


def _untrained(kind: str, aspect: str, replies: set[str]) -> str | None:
    """Why the reward model does not learn from this feedback; None where it does."""
    if kind not in TRAINABLE:
        return "kind"
    if aspect != "overall":
        return "aspect"
    if "[]" in replies:
        return "empty_reply"
    return None
