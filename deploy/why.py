"""`heed feedback why`: what became of one feedback, or of all that was said of one reply, out of the learner's state."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from deploy.door import NotDone
from deploy.known import reading
from feedback.board import Story, furthest
from feedback.events import Exchange, Feedback
from learner.config import LearnerConfig

Json = dict[str, Any]

UNTRAINED = {
    "kind": "comments are kept for people to read, and not learned from",
    "empty_reply": "the reply has no tokens to learn from",
}
DROPPED = {
    "no_exchange": "the reply it speaks of did not come before HEED_JOIN_WAIT_S was over",
    "malformed": "it does not say what its kind must say",
}
LEFT_OUT = {
    "empty": "it says nothing",
    "unusable": "a reply, or what it should have been, is too long for the model, or its chat template refuses it",
    "same": "the replies that it compares are the same",
    "aspect": "its aspect weighs nothing (HEED_ASPECT_WEIGHTS)",
    "duplicate": "the same person had said the same of the same reply",
    "contradictory": "the same person said the opposite too",
    "surplus": "newer feedback was as much as an update takes",
}


def run(feedback_or_reply: str, config: LearnerConfig, console: Console, as_json: bool) -> None:
    """Print the story. Raises NotDone for an id that the learner does not know."""
    with reading(config) as db:
        found = story_of(db, feedback_or_reply, config)
    if found is None:
        raise NotDone(
            f"the learner knows no feedback and no reply {feedback_or_reply}. It may not have read it yet (is it running?), "
            "it may belong to another data folder (--data), it may have been erased, or the id is not whole."
        )
    print(json.dumps(found)) if as_json else console.print(_page(found))


def story_of(db: sqlite3.Connection, one: str, config: LearnerConfig) -> Json | None:
    """`{"feedback": […]}` with one story a feedback, and the `reply` where a reply's id was given; None if unknown."""
    if db.execute("SELECT 1 FROM feedback WHERE id = ?", (one,)).fetchone():
        return {"feedback": [_feedback(db, one, config)]}
    named = db.execute(
        "SELECT id FROM feedback f WHERE reply_id = :one OR other_id = :one OR (kind = 'ranking'"
        " AND :one IN (SELECT value FROM json_each(f.event, '$.reply_ids'))) ORDER BY rowid",
        {"one": one},
    ).fetchall()
    reply = _reply(db, one)
    if not named and reply is None:
        return None
    return {"reply": reply, "feedback": [_feedback(db, feedback_id, config) for (feedback_id,) in named]}


def _feedback(db: sqlite3.Connection, feedback_id: str, config: LearnerConfig) -> Json:
    row = db.execute("SELECT * FROM feedback WHERE id = ?", (feedback_id,))
    values = dict(zip([column[0] for column in row.description], row.fetchone(), strict=True))
    event = Feedback.model_validate_json(values["event"])
    history = _history(db, values)
    why_not = _why_not(values, event, config)
    return {
        "id": feedback_id,
        "kind": event.kind,
        "says": _says(event),
        "aspect": event.aspect,
        "user": event.content.user,
        "status": furthest(history),
        "history": [_step(step) for step in history],
        "counts": why_not is None,
        "why_not": why_not,
        "update": _update(db, _learned_in(values, history)),
        "replies": [_reply(db, reply_id) or {"id": reply_id, "known": False} for reply_id in event.reply_ids],
    }


def _history(db: sqlite3.Connection, values: Mapping[str, Any]) -> list[Story]:
    steps = [Story("accepted", values["at"])]
    steps += [
        Story(*step)
        for step in db.execute(
            "SELECT status, at, in_update, version, reason FROM stories WHERE feedback_id = ? ORDER BY at, rowid",
            (values["id"],),
        )
    ]
    if values["fresh_s"] is not None:
        steps.append(Story("served", values["at"] + values["fresh_s"]))
    return steps


def _why_not(values: Mapping[str, Any], event: Feedback, config: LearnerConfig) -> str | None:
    """Why it does not count, in a sentence; None where it does, whatever base model replied."""
    status, reason, policy = values["status"], values["reason"] or "", config.serving.feedback.policy
    if status == "pending":
        return f"it waits for {', '.join(event.reply_ids)}, which the learner has not read yet"
    if status == "superseded":
        return f"the same person said something else of this reply later ({reason.removeprefix('by ')})"
    if status == "retracted":
        return "it was taken back"
    if status == "dropped":
        return DROPPED.get(reason, reason)
    if values["untrained"] is not None:
        return UNTRAINED.get(values["untrained"], f"it is not learned from: {values['untrained']}")
    if values["policy"] is None:
        return "it compares replies of different policies"
    if values["policy"] != policy:
        return f"it is about a reply of the policy {values['policy']}, and this is {policy}"
    if values.get("left_out") is not None:  # a file of an older Heed has no such column
        return f"the last update left it out: {LEFT_OUT.get(values['left_out'], values['left_out'])}"
    return LEFT_OUT["aspect"] if event.aspect in config.weightless else None


def _learned_in(values: Mapping[str, Any], history: Sequence[Story]) -> int | None:
    """The update that learned from it first; of one that broke, that which was to."""
    if values["learned_in"] is None:  # by this base
        return None
    told = (step.update for step in history if step.status == "in_reward_model")
    return next(told, values["learned_in"] if values.get("left_out") is None else None)


def _update(db: sqlite3.Connection, number: int | None) -> Json | None:
    if number is None:
        return None
    row = db.execute("SELECT status, version, why FROM updates WHERE number = ?", (number,)).fetchone()
    status, version, why = row or ("unknown", None, None)
    return {"number": number, "status": status, "version": None if version is None else f"v{version}", "why": why}


def _reply(db: sqlite3.Connection, reply_id: str) -> Json | None:
    row = db.execute("SELECT event FROM exchanges WHERE reply_id = ?", (reply_id,)).fetchone()
    if row is None:
        return None
    exchange = Exchange.model_validate_json(row[0])
    return {
        "id": reply_id,
        "known": True,
        "source": exchange.source,
        "version": f"v{exchange.version}" if exchange.live else None,
        "at": exchange.at,
        "user": exchange.content.user,
        "prompt": [{"role": message.role, "content": message.content} for message in exchange.content.messages],
        "completion": exchange.content.reply,
    }


def _says(event: Feedback) -> str:
    if event.kind == "thumb":
        return "up" if event.value == 1 else "down"
    if event.kind == "rating":
        return f"{event.value:g} of 5"
    if event.kind in ("preference", "ranking"):
        return "best to worst, in this order"
    value = "" if event.value is None else f" {event.value:g}"
    return event.content.text or f"{event.signal or ''}{value}".strip()


def _step(step: Story) -> Json:
    version = None if step.version is None else f"v{step.version}"
    told = {"status": step.status, "at": step.at, "update": step.update, "version": version, "reason": step.reason}
    return {name: value for name, value in told.items() if value is not None}


def _page(found: Json) -> Group:
    parts = [_reply_panel(found["reply"])] if found.get("reply") else []
    for one in found["feedback"]:
        parts += [_feedback_panel(one)]
        parts += [] if found.get("reply") else [_reply_panel(reply) for reply in one["replies"]]
    return Group(*parts)


def _feedback_panel(one: Json) -> Panel:
    table = Table.grid(padding=(0, 2))
    about = "" if one["aspect"] == "overall" else f" ({one['aspect']})"
    table.add_row("says", escape(f"{one['kind']}: {one['says']}{about}, by {one['user'] or 'somebody'}"))
    for step in one["history"]:
        where = [f"update {step['update']}"] if "update" in step else []
        where += [step[name] for name in ("version", "reason") if name in step]
        table.add_row(_time(step["at"]), escape(" ".join([step["status"], *where])))
    table.add_row("counts", "[green]yes[/green]" if one["counts"] else f"[yellow]no[/yellow]: {escape(one['why_not'])}")
    if update := one["update"]:
        outcome = " ".join(filter(None, (update["status"], update["version"], update["why"] and f"({update['why']})")))
        table.add_row("learned from", escape(f"first in update {update['number']}: {outcome}"))
    elif one["counts"]:
        before = any(step["status"] == "in_update" for step in one["history"])
        table.add_row("learned from", f"not yet{' with this base model' if before else ''}: the next update will")
    return Panel(table, title=f"{one['id']}: {one['status']}", title_align="left")


def _reply_panel(reply: Json) -> Panel:
    if not reply["known"]:
        return Panel("not read yet", title=f"reply {reply['id']}", title_align="left")
    table = Table.grid(padding=(0, 2))
    table.add_row("spoke", reply["version"] or "somebody else: it was imported")
    table.add_row("at", _time(reply["at"]))
    for message in reply["prompt"]:
        table.add_row(escape(message["role"]), escape(_short(message["content"])))
    table.add_row("reply", escape(_short(reply["completion"])))
    return Panel(table, title=f"reply {reply['id']}", title_align="left")


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
