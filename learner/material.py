"""What an update learns from, read from the tables of the state file: judgements, each with its replies, and prompts.

A reply of the base that learns comes as token ids, as it was served; one of another base in words too, to be encoded anew.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from feedback.events import Message
from learner.judgement import Judgement, Sample, Words

Line = Mapping[str, str]
"""Whose material it is: `policy`, and `base`, the fingerprint of the one that learns."""

# of the feedback in table f: it counts now, and the reward model of this policy learns from it
LEARNED_FROM = "f.status = 'joined' AND f.untrained IS NULL AND f.policy = :policy"


def live(exchange: str) -> str:
    """Of the exchange in this table: a version of ours said it (Exchange.live)."""
    return (
        "NOT EXISTS (SELECT 1 FROM exchanges AS i INDEXED BY imported"
        f" WHERE i.reply_id = {exchange}.reply_id AND json_extract(i.event, '$.source') = 'imported')"
    )


def judgements(db: sqlite3.Connection, line: Line, most: int) -> list[Judgement]:
    """As State.judgements says; `most` −1 for all."""
    rows = db.execute(
        "SELECT f.id, f.kind, f.user, f.value, f.at, f.aspect, f.event,"
        " iif(f.kind = 'correction', json_extract(e.event, '$.content.messages'), '[]'),"
        f" {_sample_of('e')}, {_sample_of('o')} FROM feedback f JOIN exchanges e ON e.reply_id = f.reply_id"
        " LEFT JOIN exchanges o ON o.reply_id = f.other_id"
        f" WHERE {LEARNED_FROM} ORDER BY f.kind = 'signal', f.at DESC, f.id DESC LIMIT :most",
        {**line, "most": most},
    ).fetchall()
    return sorted((_judgement(db, line, row) for row in rows), key=lambda one: (one.at, one.feedback_id))


def prompts(db: sqlite3.Connection, line: Line, most: int) -> list[tuple[int, ...]]:
    """As State.prompts says."""
    rows = db.execute(
        "SELECT prompt_ids FROM exchanges WHERE policy = :policy AND base = :base"
        " GROUP BY prompt_ids ORDER BY max(at) DESC, max(reply_id) DESC LIMIT :most",
        {**line, "most": most},
    )
    return [tuple(json.loads(ids)) for (ids,) in rows]


def _judgement(db: sqlite3.Connection, line: Line, row: Sequence[Any]) -> Judgement:
    id_, kind, user, value, at, aspect, event, messages, *pair = row
    said = json.loads(event)
    return Judgement(
        id_,
        kind,
        user,
        1.0 if value is None else value,
        _sample(*pair[:6]),
        None if pair[6] is None else _sample(*pair[6:]),
        at,
        aspect,
        signal=said.get("signal"),
        correction=_words(json.loads(messages), said["content"].get("text")) if kind == "correction" else None,
        ranked=_samples(db, line, said["reply_ids"]) if kind == "ranking" else (),
    )


def _samples(db: sqlite3.Connection, line: Line, reply_ids: Sequence[str]) -> tuple[Sample, ...]:
    rows = db.execute(
        f"SELECT {_sample_of('e')} FROM json_each(:named) named"
        " JOIN exchanges e ON e.reply_id = named.value ORDER BY named.key",
        {**line, "named": json.dumps(reply_ids)},
    )
    return tuple(_sample(*row) for row in rows)


def _sample_of(exchange: str) -> str:
    """The columns that `_sample` takes of the exchange in this table."""
    columns = ", ".join(f"{exchange}.{name}" for name in ("reply_id", "prompt_ids", "reply_ids", "version"))
    what = "'$.content.messages', '$.content.reply', '$.finish_reason', '$.sampling.stop'"
    return f"{columns}, {live(exchange)}, iif({exchange}.base = :base, NULL, json_extract({exchange}.event, {what}))"


def _sample(reply_id: str, prompt_ids: str, reply_ids: str, version: int, ours: int, said: str | None) -> Sample:
    """`said`: messages, reply, why it ended and the texts that may have cut it, where another base replied."""
    ids = tuple(json.loads(prompt_ids)), tuple(json.loads(reply_ids))
    if said is None:
        return Sample(reply_id, *ids, version, None, bool(ours))
    messages, text, reason, stop = json.loads(said)
    ended = reason == "stop" and not stop  # what a stop text cut has no end of its own
    return Sample(reply_id, *ids, version, _words(messages, text, ended=ended), bool(ours))


def _words(messages: Sequence[Any], text: str | None, *, ended: bool = True) -> Words:
    return Words(tuple(map(Message.model_validate, messages)), text or "", ended)
