"""`heed feedback export`: what was said and what was thought of it, out of the learner's state, in TRL's column names.

    unpaired     prompt, completion, label        for KTO
    preferences  prompt, chosen, rejected         for DPO and reward models
    ratings      prompt, completion, rating
    exchanges    prompt, completion               every exchange, judged or not

https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape

from deploy.door import NotDone, complain, shown_on
from deploy.known import reading
from deploy.rows import NEEDS_PYARROW, SUFFIXES
from feedback.events import Exchange, Message
from learner.config import LearnerConfig

if TYPE_CHECKING:
    import pyarrow

Json = dict[str, Any]

KINDS = {"unpaired": "thumb", "ratings": "rating", "preferences": "preference"}
SHAPES = (*KINDS, "exchanges")
BATCH = 1000
"""Rows of a Parquet row group."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to export, whither and how."""

    out: Path | None = None
    format: str | None = None
    kind: str | None = None
    everything: bool = False
    """Also feedback that does not count."""
    text: bool = False
    """Prompts and replies as plain texts."""


def run(plan: Plan, config: LearnerConfig, console: Console, as_json: bool) -> None:
    """Write one shape to a file or standard output, or each to a file in a folder. Raises NotDone, OSError."""
    kind = _format(plan)
    with reading(config) as db:
        if plan.kind is not None and plan.out is None:
            _write_lines(sys.stdout, _rows(db, plan.kind, plan))
            return
        if plan.kind is not None and plan.out is not None:
            files = {plan.kind: plan.out}
        else:
            folder = plan.out or Path("heed-export")
            files = {shape: folder / f"{shape}.{kind}" for shape in SHAPES}
        written = {}
        for shape, path in files.items():
            rows = shown_on(console, shape, _rows(db, shape, plan), _most(db, shape))
            written[shape] = _write(path, kind, shape, rows, plan.text)
        left = _left_out(db, plan) if plan.kind is None else {}
    if as_json:
        print(json.dumps({"files": {str(files[s]): n for s, n in written.items()}, "left_out": left}))
        return
    for shape, path in files.items():
        console.print(f"{escape(str(path))}: {written[shape]} rows", soft_wrap=True, highlight=False)
    if left:
        said = ", ".join(f"{count} {kind}" for kind, count in left.items())
        complain(f"left out, because they have no such shape or do not count: {said}", "yellow")


def _format(plan: Plan) -> str:
    if plan.kind is not None and plan.kind not in SHAPES:
        raise NotDone(f"--kind {plan.kind}: must be one of {', '.join(SHAPES)}.")
    if plan.kind is None and plan.out is not None and plan.out.suffix.lower() in SUFFIXES:
        raise NotDone(f"--out {plan.out} must be a folder, for a file of each kind; to have one file say --kind too.")
    suffix = SUFFIXES.get(plan.out.suffix.lower(), "jsonl") if plan.out is not None else "jsonl"
    kind = plan.format or suffix
    if kind not in ("jsonl", "parquet"):
        raise NotDone(f"the format {kind} cannot be written: --format must be jsonl or parquet.")
    if kind == "parquet" and plan.kind is not None and plan.out is None:
        raise NotDone("Parquet cannot be written to standard output: name a file with --out.")
    return kind


def _most(db: sqlite3.Connection, shape: str) -> int:
    """How many rows a shape has at most."""
    if shape == "exchanges":
        return int(db.execute("SELECT count(*) FROM exchanges").fetchone()[0])
    return int(db.execute("SELECT count(*) FROM feedback WHERE kind = ?", (KINDS[shape],)).fetchone()[0])


def _rows(db: sqlite3.Connection, shape: str, plan: Plan) -> Iterator[Json]:
    """One row a judgement, or an exchange, in the order in which they were absorbed."""
    if shape == "exchanges":
        for (text,) in db.execute("SELECT event FROM exchanges ORDER BY rowid"):
            yield _exchange_row(Exchange.model_validate_json(text), plan.text)
        return
    counts = "" if plan.everything else " AND f.status = 'joined'"
    found = db.execute(
        "SELECT f.id, f.user, f.aspect, f.value, f.at, f.status, f.reason, e.event, o.event"
        " FROM feedback f CROSS JOIN exchanges e ON e.reply_id = f.reply_id"
        " LEFT JOIN exchanges o ON o.reply_id = f.other_id"
        f" WHERE f.kind = ? AND f.reason IS NOT 'malformed'{counts} ORDER BY f.rowid",
        (KINDS[shape],),
    )
    for feedback_id, user, aspect, value, at, status, reason, first, other in found:
        reply = Exchange.model_validate_json(first)
        about = {"user": user, "at": at, "aspect": aspect, "status": status, "reason": reason, "id": feedback_id}
        if shape != "preferences":
            said = {"label": value == 1} if shape == "unpaired" else {"rating": int(value)}
            yield {**_completed(reply, plan.text), **said, **about, **_of_reply(reply)}
        elif other is not None and (worse := Exchange.model_validate_json(other)) and _same_prompt(reply, worse):
            yield {**_compared(reply, worse, plan.text), **about, **_of_reply(reply), **_of_rejected(worse)}


def _exchange_row(exchange: Exchange, text: bool) -> Json:
    about = {"user": exchange.content.user, "at": exchange.at, "turn": exchange.turn}
    ended = {"source": exchange.source, "finish_reason": exchange.finish_reason}
    return {**_completed(exchange, text), **about, **_of_reply(exchange), **ended}


def _completed(exchange: Exchange, text: bool) -> Json:
    content = exchange.content
    return {"prompt": _prompt(content.messages, text), "completion": _reply(content.reply, text)}


def _compared(better: Exchange, worse: Exchange, text: bool) -> Json:
    return {
        "prompt": _prompt(better.content.messages, text),
        "chosen": _reply(better.content.reply, text),
        "rejected": _reply(worse.content.reply, text),
    }


def _same_prompt(one: Exchange, other: Exchange) -> bool:
    """A preference may compare replies to two prompts, which TRL's shape cannot say."""
    return one.content.messages == other.content.messages


def _of_reply(exchange: Exchange) -> Json:
    return {"reply_id": exchange.id, "version": _version(exchange), "conversation": exchange.conversation}


def _of_rejected(exchange: Exchange) -> Json:
    return {"rejected_id": exchange.id, "rejected_version": _version(exchange)}


def _version(exchange: Exchange) -> str | None:
    """The version that spoke; of what was imported, none of ours did."""
    return f"v{exchange.version}" if exchange.live else None


def _prompt(messages: Sequence[Message], text: bool) -> str | list[Json]:
    """As messages; as text one user message is its text, and several are a line each, as `user: …`."""
    if not text:
        return [{"role": message.role, "content": message.content} for message in messages]
    if [message.role for message in messages] == ["user"]:
        return messages[0].content
    return "".join(f"{message.role}: {message.content}\n" for message in messages) + "assistant:"


def _reply(reply: str, text: bool) -> str | list[Json]:
    return reply if text else [{"role": "assistant", "content": reply}]


def _left_out(db: sqlite3.Connection, plan: Plan) -> dict[str, int]:
    """Feedback that is in no file, by kind where it has no shape, else by why."""
    found = db.execute(
        "SELECT CASE WHEN f.kind NOT IN ('thumb', 'rating', 'preference') THEN f.kind WHEN f.status != 'joined'"
        " THEN f.status ELSE 'preference between two prompts' END AS why, count(*) FROM feedback f"
        " LEFT JOIN exchanges e ON e.reply_id = f.reply_id LEFT JOIN exchanges o ON o.reply_id = f.other_id"
        " WHERE f.kind NOT IN ('thumb', 'rating', 'preference') OR (f.status != 'joined' AND NOT :everything)"
        " OR e.reply_id IS NULL OR (f.kind = 'preference' AND (o.reply_id IS NULL OR"
        " json_extract(e.event, '$.content.messages') != json_extract(o.event, '$.content.messages')))"
        " GROUP BY why",
        {"everything": plan.everything},
    )
    return dict(found.fetchall())


def _write(path: Path, kind: str, shape: str, rows: Iterable[Json], text: bool) -> int:
    """Write a file whole, then give it its name; returns how many rows it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    try:
        if kind == "parquet":
            count = _write_parquet(draft, _schema(shape, text), rows)
        else:
            with draft.open("w", encoding="utf-8") as file:
                count = _write_lines(file, rows)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _write_lines(file: TextIO, rows: Iterable[Json]) -> int:
    count = 0
    for row in rows:
        count += 1
        file.write(json.dumps(row) + "\n")
    return count


def _write_parquet(path: Path, schema: pyarrow.Schema, rows: Iterable[Json]) -> int:
    import pyarrow
    from pyarrow import parquet

    count = 0
    with closing(parquet.ParquetWriter(path, schema)) as writer:
        batch: list[Json] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                count += len(batch)
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                batch.clear()
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    return count + len(batch)


def _schema(shape: str, text: bool) -> pyarrow.Schema:
    """The columns of a shape, whose types do not depend on what happens to be in them. Raises NotDone."""
    try:
        import pyarrow
    except ImportError as error:
        raise NotDone(NEEDS_PYARROW) from error
    words = pyarrow.string()
    said = words if text else pyarrow.list_(pyarrow.struct([("role", words), ("content", words)]))
    types: Mapping[str, pyarrow.DataType] = {
        **dict.fromkeys(("prompt", "completion", "chosen", "rejected"), said),
        "label": pyarrow.bool_(),
        "rating": pyarrow.int8(),
        "at": pyarrow.float64(),
        "turn": pyarrow.int32(),
    }
    return pyarrow.schema([(column, types.get(column, words)) for column in COLUMNS[shape]])


_JUDGED = ("user", "at", "aspect", "status", "reason", "id", "reply_id", "version", "conversation")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "unpaired": ("prompt", "completion", "label", *_JUDGED),
    "ratings": ("prompt", "completion", "rating", *_JUDGED),
    "preferences": ("prompt", "chosen", "rejected", *_JUDGED, "rejected_id", "rejected_version"),
    "exchanges": (
        "prompt", "completion", "user", "at", "turn", "reply_id", "version", "conversation", "source", "finish_reason"
    ),
}  # fmt: skip
