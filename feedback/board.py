"""The board: what processes show each other for speed. Never the truth: without it Heed is slower, and loses nothing.

The embedded board is two files: each process writes its own and reads the other's.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from feedback.config import FeedbackConfig
from feedback.events import Message
from feedback.sqlite_file import OtherFile, OwnFile, Row, Statement

Status = Literal[
    "accepted", "joined", "in_reward_model", "in_update", "in_version", "served", "dropped", "superseded", "retracted"
]
STATUSES: tuple[Status, ...] = (
    "accepted", "joined", "in_reward_model", "in_update", "in_version", "served", "dropped", "superseded", "retracted"
)  # fmt: skip
"""From the least far to the furthest: the way of a feedback, then the three ways to stop counting."""


class Story(NamedTuple):
    """One step of a feedback's story: that it reached `status` at `at` (seconds since the epoch)."""

    status: Status
    at: float
    update: int | None = None
    version: int | None = None
    reason: str | None = None


def furthest(history: Iterable[Story]) -> Status:
    """The one-word status: the furthest step reached.

    No history is `accepted`: an id that proves itself was accepted, whatever the board has forgotten.
    """
    return max((step.status for step in history), key=STATUSES.index, default="accepted")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a feedback's giver was told: enough to tell them the same again, or that the body differs."""

    feedback_id: str
    kind: str
    body: str
    """Digest of the request's body."""
    at: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where an exchange stands: its conversation, and its turn there, from 0."""

    conversation: str
    turn: int


class Board(Protocol):
    """Short blocking calls (well under a millisecond), safe from many threads; none raises when the board is away."""

    def continue_conversation(self, caller: str, messages: Sequence[Message], conversation: str | None = None) -> Place:
        """Where the exchange that answers this prompt stands.

        `conversation` is the name the client gave, if any. Without one, the prompt up to its last assistant message is
        looked for among this caller's exchanges; not found: turn 0 of a new conversation.
        """
        ...

    def remember_exchange(self, caller: str, messages: Sequence[Message], reply: str, place: Place) -> None:
        """Remember that `reply` answered `messages` at `place` (once for each choice), for continue_conversation."""
        ...

    def put_exchange(self, reply_id: str, exchange: str) -> None:
        """Keep an exchange (JSON) for get_exchange, for as long as there is room."""
        ...

    def get_exchange(self, reply_id: str) -> str | None:
        """The exchange as it was put; None where it is no longer, or was never, here."""
        ...

    def remember_receipt(self, feedback_id: str, kind: str, body_digest: str, at: float) -> None:
        """Remember a feedback as accepted; the first receipt of an id stays."""
        ...

    def receipt(self, feedback_id: str) -> Receipt | None:
        """The receipt of a feedback, None where it is no longer, or was never, here."""
        ...

    def ask_update(self, at: float) -> None:
        """Ask the learner for an update now (POST /admin/update)."""
        ...

    def update_asked(self) -> float | None:
        """When an update was last asked for."""
        ...

    def activated(self, version: int, at: float) -> None:
        """Note that a version is being served; the first time counts."""
        ...

    def activations(self) -> dict[int, float]:
        """Version → when it was first served."""
        ...

    def write_story(self, feedback_id: str, steps: Sequence[Story]) -> None:
        """Add steps to a feedback's story; a step of a status it already has replaces that one."""
        ...

    def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> None:
        """write_story for many feedbacks (id → steps), all at once."""
        ...

    def story(self, feedback_id: str) -> list[Story]:
        """All that is known of a feedback, by either process, in order of time."""
        ...

    def set_report(self, name: str, report: str) -> None:
        """Show a report (JSON) in place of the one before; "policy" is the learner's part of GET /v1/policy."""
        ...

    def report(self, name: str) -> str | None:
        """The latest report of this name, this process's own or else the other's."""
        ...

    async def take(self, name: str, per_minute: int) -> float:
        """Take one of the requests that `name` may send: 0.0 where it is granted, else seconds until one is again."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


def open_board(config: FeedbackConfig, owner: Literal["server", "learner"]) -> Board:
    """The board of these settings, as one of the two processes sees it."""
    own, other = ("server", "learner") if owner == "server" else ("learner", "server")
    return SqliteBoard(config.data / "board" / f"{own}.db", config.data / "board" / f"{other}.db")


@dataclass(frozen=True, slots=True)
class Room:
    """How much the board keeps; the oldest go first."""

    exchanges: int = 20_000
    exchange_bytes: int = 256 * 2**20
    conversations: int = 50_000
    """Exchanges that a prompt may continue."""
    receipts: int = 200_000
    stories: int = 1_000_000
    """Steps, of which a feedback has up to six."""


_SCHEMA = """
CREATE TABLE turns (digest BLOB PRIMARY KEY, conversation TEXT NOT NULL, turn INTEGER NOT NULL) STRICT;
CREATE TABLE exchanges (reply_id TEXT PRIMARY KEY, size INTEGER NOT NULL, exchange TEXT NOT NULL) STRICT;
CREATE INDEX exchange_sizes ON exchanges (size);
CREATE TABLE receipts (feedback_id TEXT PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE TABLE activations (version INTEGER PRIMARY KEY, at REAL NOT NULL) STRICT;
CREATE TABLE stories (
    feedback_id TEXT NOT NULL, status TEXT NOT NULL, at REAL NOT NULL, "update" INTEGER, version INTEGER, reason TEXT,
    PRIMARY KEY (feedback_id, status)
) STRICT;
CREATE TABLE reports (name TEXT PRIMARY KEY, report TEXT NOT NULL) STRICT;
"""

_PRUNE_EVERY = 256
"""Writes between two looks at whether there is still room."""


class SqliteBoard:
    """The embedded board: `path_own` is ours to write (made, and made again when damaged), `path_other` only read."""

    def __init__(self, path_own: Path, path_other: Path, room: Room = Room()) -> None:
        self._own = OwnFile(path_own, _SCHEMA)
        self._other = OtherFile(path_other)
        self._room = room
        self._writes = 0
        self._due: dict[str, float] = {}
        """Name → when (time.monotonic()) all that it took will have been given back."""

    def continue_conversation(self, caller: str, messages: Sequence[Message], conversation: str | None = None) -> Place:
        if conversation is not None:
            return Place(conversation, self._turn_in(caller, messages, conversation))
        earlier = _up_to_last_reply(messages)
        found = self._place(_digest(caller, None, "after", earlier)) if earlier else None
        return found or Place("conv-" + secrets.token_hex(12), 0)

    def _turn_in(self, caller: str, messages: Sequence[Message], conversation: str) -> int:
        """The turn in a named conversation: that of the same prompt, else of what it continues, else the next."""
        keys = (
            _digest(caller, conversation, "prompt", messages),
            _digest(caller, conversation, "after", _up_to_last_reply(messages)),
            _digest(caller, conversation, "last", ()),
        )
        return next((place.turn for place in map(self._place, keys) if place), 0)

    def _place(self, digest: bytes) -> Place | None:
        rows = self._own.read("SELECT conversation, turn FROM turns WHERE digest = ?", (digest,))
        return Place(*rows[0]) if rows else None

    def remember_exchange(self, caller: str, messages: Sequence[Message], reply: str, place: Place) -> None:
        after = (*messages, Message(role="assistant", content=reply))
        named = place.conversation
        turns = (
            (_digest(caller, None, "after", after), place.turn + 1),
            (_digest(caller, named, "after", after), place.turn + 1),
            (_digest(caller, named, "prompt", messages), place.turn),
            (_digest(caller, named, "last", ()), place.turn + 1),
        )
        sql = "INSERT OR REPLACE INTO turns (digest, conversation, turn) VALUES (?, ?, ?)"
        self._write([(sql, (digest, named, turn)) for digest, turn in turns])

    def put_exchange(self, reply_id: str, exchange: str) -> None:
        sql = "INSERT OR REPLACE INTO exchanges (reply_id, size, exchange) VALUES (?, ?, ?)"
        self._write([(sql, (reply_id, len(exchange), exchange))])

    def get_exchange(self, reply_id: str) -> str | None:
        rows = self._own.read("SELECT exchange FROM exchanges WHERE reply_id = ?", (reply_id,))
        return rows[0][0] if rows else None

    def remember_receipt(self, feedback_id: str, kind: str, body_digest: str, at: float) -> None:
        sql = "INSERT OR IGNORE INTO receipts (feedback_id, kind, body, at) VALUES (?, ?, ?, ?)"
        self._write([(sql, (feedback_id, kind, body_digest, at))])

    def receipt(self, feedback_id: str) -> Receipt | None:
        rows = self._both("SELECT feedback_id, kind, body, at FROM receipts WHERE feedback_id = ?", (feedback_id,))
        return Receipt(*rows[0]) if rows else None

    def ask_update(self, at: float) -> None:
        self.set_report("update asked", json.dumps(at))

    def update_asked(self) -> float | None:
        asked = self.report("update asked")
        return None if asked is None else float(json.loads(asked))

    def activated(self, version: int, at: float) -> None:
        self._write([("INSERT OR IGNORE INTO activations (version, at) VALUES (?, ?)", (version, at))])

    def activations(self) -> dict[int, float]:
        first: dict[int, float] = {}
        for version, at in self._both("SELECT version, at FROM activations", ()):
            first[version] = min(at, first.get(version, at))
        return first

    def write_story(self, feedback_id: str, steps: Sequence[Story]) -> None:
        self.write_stories({feedback_id: steps})

    def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> None:
        columns = '(feedback_id, status, at, "update", version, reason)'
        sql = f"INSERT OR REPLACE INTO stories {columns} VALUES (?, ?, ?, ?, ?, ?)"
        self._write([(sql, (feedback_id, *Story(*step))) for feedback_id, steps in stories.items() for step in steps])

    def story(self, feedback_id: str) -> list[Story]:
        sql = 'SELECT status, at, "update", version, reason FROM stories WHERE feedback_id = ?'
        steps = [Story(*row) for row in self._both(sql, (feedback_id,))]
        receipt = self.receipt(feedback_id)
        if receipt is not None:
            steps.append(Story("accepted", receipt.at))
        return _in_order(_with_served(steps, self.activations()))

    def set_report(self, name: str, report: str) -> None:
        self._write([("INSERT OR REPLACE INTO reports (name, report) VALUES (?, ?)", (name, report))])

    def report(self, name: str) -> str | None:
        rows = self._both("SELECT report FROM reports WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    async def take(self, name: str, per_minute: int) -> float:
        """A token bucket in this process, full at first: it holds a minute's requests, and is refilled evenly."""
        now = time.monotonic()
        due = max(now, self._due.get(name, now)) + 60 / per_minute
        wait = due - now - 60
        if wait > 1e-6:  # rounding must not cost a request
            return wait
        self._due[name] = due
        return 0.0

    def close(self) -> None:
        self._own.close()
        self._other.close()

    def _both(self, sql: str, values: Row) -> list[Row]:
        """The rows of this process's own file, then of the other's."""
        return self._own.read(sql, values) + self._other.read(sql, values)

    def _write(self, statements: Sequence[Statement]) -> None:
        before, self._writes = self._writes, self._writes + len(statements)
        full = before // _PRUNE_EVERY < self._writes // _PRUNE_EVERY
        self._own.write([*statements, *(_pruning(self._room) if full else ())])


def _pruning(room: Room) -> list[Statement]:
    """Statements that delete the oldest rows beyond what there is room for."""
    rows = {"turns": 4 * room.conversations, "exchanges": room.exchanges}
    rows |= {"receipts": room.receipts, "stories": room.stories}
    by_count: list[Statement] = [
        (f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", (most,))
        for table, most in rows.items()
    ]
    by_size = (
        "DELETE FROM exchanges WHERE (SELECT sum(size) FROM exchanges) > ?1 AND rowid <= (SELECT max(rowid) FROM "
        "(SELECT rowid, sum(size) OVER (ORDER BY rowid DESC) AS newer FROM exchanges) WHERE newer > ?1)"
    )
    return [*by_count, (by_size, (room.exchange_bytes,))]


def _up_to_last_reply(messages: Sequence[Message]) -> Sequence[Message]:
    """The prompt that an earlier exchange left behind: everything up to the last assistant message, or nothing."""
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    return messages[: ends[-1]] if ends else ()


def _digest(caller: str, conversation: str | None, what: str, messages: Sequence[Message]) -> bytes:
    """Key of a place. System messages are left out: many clients write the time into them."""
    said = [[message.role, message.content.strip()] for message in messages if message.role in ("user", "assistant")]
    text = json.dumps([caller, conversation, what, said])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _with_served(steps: list[Story], activations: Mapping[int, float]) -> list[Story]:
    """The steps, and `served` where the version it went into was: the server knows that before the learner does."""
    served = [
        Story("served", max(step.at, activations[step.version]), step.update, step.version)
        for step in steps
        if step.status == "in_version" and step.version is not None and step.version in activations
    ]
    return steps + served


def _in_order(steps: Iterable[Story]) -> list[Story]:
    """One step a status, the earliest, in order of time."""
    earliest: dict[str, Story] = {}
    for step in steps:
        if step.status not in earliest or step.at < earliest[step.status].at:
            earliest[step.status] = step
    return sorted(earliest.values(), key=lambda step: (step.at, STATUSES.index(step.status)))
