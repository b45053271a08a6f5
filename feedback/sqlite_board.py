"""The embedded board: two files, of which each process writes its own and reads the other's, on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from feedback.board import Board, Receipt, Story
from feedback.conversations import Place
from feedback.jobs import Jobs
from feedback.quotas import Buckets
from feedback.sqlite_file import OtherFile, OwnFile, Row, Statement


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


class SqliteBoard(Board):
    """`path_own` is ours to write (made, and made again when damaged), `path_other` only read."""

    def __init__(self, path_own: Path, path_other: Path, room: Room = Room()) -> None:
        self._own = OwnFile(path_own, _SCHEMA)
        self._other = OtherFile(path_other)
        self._room = room
        self._writes = 0
        self._jobs = Jobs(self._write_all)
        self._buckets = Buckets()

    async def place(self, digests: Sequence[bytes]) -> Place | None:
        marks = ", ".join("?" * len(digests))
        sql = f"SELECT digest, conversation, turn FROM turns WHERE digest IN ({marks})"
        found = {digest: Place(*row) for digest, *row in await self._read(sql, tuple(digests))}
        return next((found[digest] for digest in digests if digest in found), None)

    async def remember_places(self, places: Mapping[bytes, Place]) -> None:
        sql = "INSERT OR REPLACE INTO turns (digest, conversation, turn) VALUES (?, ?, ?)"
        await self._write([(sql, (digest, place.conversation, place.turn)) for digest, place in places.items()])

    async def put_exchange(self, reply_id: str, exchange: str) -> None:
        sql = "INSERT OR REPLACE INTO exchanges (reply_id, size, exchange) VALUES (?, ?, ?)"
        await self._write([(sql, (reply_id, len(exchange), exchange))])

    async def get_exchange(self, reply_id: str) -> str | None:
        rows = await self._read("SELECT exchange FROM exchanges WHERE reply_id = ?", (reply_id,))
        return rows[0][0] if rows else None

    async def versions(self, reply_ids: Sequence[str]) -> dict[str, int]:
        marks = ", ".join("?" * len(reply_ids))
        sql = f"SELECT reply_id, json_extract(exchange, '$.version') FROM exchanges WHERE reply_id IN ({marks})"
        return dict(await self._read(sql, tuple(reply_ids)))

    async def remember_receipts(self, receipts: Sequence[Receipt]) -> None:
        marks = ", ".join(["(?, ?, ?, ?)"] * len(receipts))
        values = tuple(value for one in receipts for value in (one.feedback_id, one.kind, one.body, one.at))
        await self._write([(f"INSERT OR IGNORE INTO receipts (feedback_id, kind, body, at) VALUES {marks}", values)])

    async def receipt(self, feedback_id: str) -> Receipt | None:
        rows = await self._both(
            "SELECT feedback_id, kind, body, at FROM receipts WHERE feedback_id = ?", (feedback_id,)
        )
        return Receipt(*rows[0]) if rows else None

    async def take(self, caller: str, per_minute: int) -> float:
        return self._buckets.take(caller, per_minute)

    async def activated(self, version: int, at: float) -> None:
        await self._write([("INSERT OR IGNORE INTO activations (version, at) VALUES (?, ?)", (version, at))])

    async def activations(self) -> dict[int, float]:
        first: dict[int, float] = {}
        for version, at in await self._both("SELECT version, at FROM activations", ()):
            first[version] = min(at, first.get(version, at))
        return first

    async def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> bool:
        columns = '(feedback_id, status, at, "update", version, reason)'
        sql = f"INSERT OR REPLACE INTO stories {columns} VALUES (?, ?, ?, ?, ?, ?)"
        lines = [(feedback_id, *Story(*step)) for feedback_id, steps in stories.items() for step in steps]
        return await self._write([(sql, line) for line in lines])

    async def steps(self, feedback_id: str) -> list[Story]:
        sql = 'SELECT status, at, "update", version, reason FROM stories WHERE feedback_id = ?'
        return [Story(*row) for row in await self._both(sql, (feedback_id,))]

    async def set_report(self, name: str, report: str) -> None:
        await self._write([_reporting(name, report)])

    async def report(self, name: str) -> str | None:
        rows = await self._both("SELECT report FROM reports WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    async def forgot(self) -> bool:
        return not await self._read("SELECT 1 FROM reports WHERE name = 'epoch'", ())

    async def begin_epoch(self) -> bool:
        return await self._write([_reporting("epoch", "{}")])

    async def hint(self, name: str) -> None:
        """Nobody can be woken through a file: who waits looks often enough."""

    async def wait_for_hint(self, name: str, at_most_s: float) -> bool:  # noqa: ARG002 (none can come)
        await asyncio.sleep(at_most_s)
        return False

    async def close(self) -> None:
        await self._jobs.end()
        self._own.close()
        self._other.close()

    async def _read(self, sql: str, values: Row) -> list[Row]:
        return await self._jobs.do(lambda: self._own.read(sql, values))

    async def _both(self, sql: str, values: Row) -> list[Row]:
        """The rows of this process's own file, then of the other's."""
        return await self._jobs.do(lambda: self._own.read(sql, values) + self._other.read(sql, values))

    async def _write(self, statements: Sequence[Statement]) -> bool:
        return cast(bool, await self._jobs.do(statements))

    def _write_all(self, statements: Sequence[Statement]) -> bool:
        """In one transaction; now and then with a look at whether there is still room."""
        before, self._writes = self._writes, self._writes + len(statements)
        full = before // _PRUNE_EVERY < self._writes // _PRUNE_EVERY
        return self._own.write([*statements, *(_pruning(self._room) if full else ())])


def _reporting(name: str, report: str) -> Statement:
    return "INSERT OR REPLACE INTO reports (name, report) VALUES (?, ?)", (name, report)


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
