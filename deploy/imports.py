"""`heed feedback import`: past chats and judgements from a file into the log, as the learner takes them.

What is imported has the ids of what it says: a file that is imported again, whole or from where a kill stopped it, is
known already and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from deploy.door import NotDone, complain
from deploy.known import Known
from deploy.past import COLUMNS, BadLine, Past, read_past
from deploy.rows import Row, Rows, format_of
from deploy.writing import Encoded, Writing
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import open_log
from learner.config import LearnerConfig
from serving.chat import ChatError
from serving.claims import CannotStart, hold, prepare_folder
from serving.exits import Exit
from serving.ids import Ids, load_secret
from serving.model import fingerprint, load_chat
from serving.process import longest

NOT_COUNTED = ("superseded", "retracted", "dropped")
SHOWN = 20
"""Bad lines that are told one by one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to import, and how."""

    file: Path
    format: str | None = None
    skip_bad: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class Tally:
    """What a file held."""

    lines: int = 0
    exchanges: int = 0
    judgements: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    """By the column that was wrong; or `known` (exported from this very folder), `repeated` (an id met before) and
    `not counted` (by the status that an export gave it)."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """The first bad lines, with what is wrong."""
    bad: int = 0

    def take(self, past: Past) -> None:
        self.exchanges += len(past.replies)
        self.judgements[past.kind or "none"] += 1

    def refuse(self, number: int, error: BadLine) -> None:
        self.bad += 1
        self.skipped[error.column] += 1
        if len(self.problems) < SHOWN:
            self.problems.append((number, str(error)))


def run(plan: Plan, config: LearnerConfig, console: Console, as_json: bool) -> int:
    """Check the file, then import it; returns the exit code. Raises NotDone, ModelError, LogUnavailable."""
    rows = Rows(plan.file, format_of(plan.file, plan.format), COLUMNS)
    first = next(iter(rows), None)
    if first is None:
        raise NotDone(f"{plan.file} holds nothing.")
    try:
        with contextlib.ExitStack() as held:
            if not plan.dry_run:
                held.enter_context(_claimed(config))
            importer = Importer(plan, config, rows, console)
            tally = importer.go()
    except CannotStart as error:
        complain(str(error), "red")
        return error.code
    report = _report(plan, rows, tally, importer.done)
    print(json.dumps(report)) if as_json else _tell(plan, report, console)
    return Exit.DONE if importer.done or (plan.dry_run and not tally.bad) else Exit.FAILED


@contextlib.contextmanager
def _claimed(config: LearnerConfig) -> Iterator[None]:
    """The data folder, which no server may use meanwhile: an embedded log has one writing process. Raises CannotStart."""
    data = config.serving.feedback.data
    prepare_folder(data)
    if config.serving.feedback.kafka.kafka_bootstrap:  # which takes events from many
        yield
        return
    with hold(data / "server.lock") as lock:
        os.write(lock, f"{os.getpid()} heed feedback import\n".encode())
        yield


class Importer:
    """Goes through one file: once to check it (unless bad lines are to be skipped), once to import it."""

    def __init__(self, plan: Plan, config: LearnerConfig, rows: Rows, console: Console) -> None:
        self.plan, self.config, self.rows, self.console = plan, config, rows, console
        serving = config.serving
        folder, self.chat, model = load_chat(serving.model)
        self.base = fingerprint(folder, self.chat)
        self.max_len = longest(serving, model)
        self.now = time.time()
        self.done = False

    def go(self) -> Tally:
        """What was imported, or, where something is wrong, what would have been."""
        if self.plan.dry_run or not self.plan.skip_bad:
            tally = self._pass("checking", None)
            if self.plan.dry_run or tally.bad:
                return tally
        feedback = self.config.serving.feedback
        try:
            ids = Ids(load_secret(feedback))
        except ValueError as error:
            raise CannotStart(Exit.DATA, str(error)) from error
        with contextlib.closing(open_log(feedback, writes=(EXCHANGES, FEEDBACK))) as log:
            tally = self._pass("importing", Writing(ids, log, policy=feedback.policy, base=self.base, now=self.now))
        self.done = tally.lines > tally.bad
        return tally

    def _pass(self, doing: str, writing: Writing | None) -> Tally:
        tally = Tally()
        with contextlib.ExitStack() as opened:
            known = opened.enter_context(Known(self.config))
            bar = opened.enter_context(Progress(console=self.console, disable=not self.console.is_terminal))
            task = bar.add_task(doing, total=1.0)
            for row in self.rows:
                tally.lines += 1
                try:
                    self._take(row, known, tally, writing)
                except BadLine as error:
                    if writing is not None and not self.plan.skip_bad:
                        raise NotDone(
                            f"{self.plan.file} changed while it was read: line {row.number}: {error}"
                        ) from None
                    tally.refuse(row.number, error)
                bar.update(task, completed=row.share)
            if writing is not None:
                writing.finish()
        return tally

    def _take(self, row: Row, known: Known, tally: Tally, writing: Writing | None) -> None:
        if row.problem is not None:
            raise BadLine("line", row.problem)
        past = read_past(row.values, self.now)
        content = past.content()
        encoded = [self._encode(past, reply) for reply in past.replies]
        if row.values.get("status") in NOT_COUNTED:
            tally.skipped["not counted"] += 1
            return
        if known.by_the_learner(row.values):
            tally.skipped["known"] += 1
            return
        repeat = known.repeats(past.id, content)
        if past.id is not None and repeat:
            tally.skipped["repeated"] += 1
            return
        tally.take(past)
        if writing is not None:
            writing.write(past, content, repeat, encoded)

    def _encode(self, past: Past, reply: str) -> Encoded:
        """Prompt and reply ids. Raises BadLine where the model cannot hold them."""
        characters = sum(len(message.content) for message in past.prompt) + len(reply)
        room = f"more than the {self.max_len} tokens that this model takes, prompt and reply together"
        if characters > self.max_len * self.chat.longest_token:  # encoding it all would take long
            raise BadLine("line", f"has {characters} characters, {room}")
        try:
            prompt_ids, reply_ids = self.chat.encode_answered(past.prompt, reply)
        except ChatError as error:
            raise BadLine("prompt", f"cannot be answered: {error}") from error
        if len(prompt_ids) + len(reply_ids) > self.max_len:
            raise BadLine("line", f"has {len(prompt_ids)} + {len(reply_ids)} tokens, {room}")
        return prompt_ids, reply_ids


def _report(plan: Plan, rows: Rows, tally: Tally, done: bool) -> dict[str, Any]:
    return {
        "file": str(plan.file),
        "format": rows.kind,
        "imported": done,
        "lines": tally.lines,
        "exchanges": tally.exchanges,
        "judgements": {kind: tally.judgements[kind] for kind in ("thumb", "rating", "preference")},
        "without_judgement": tally.judgements["none"],
        "skipped": dict(tally.skipped),
        "bad": tally.bad,
        "problems": [{"line": number, "problem": problem} for number, problem in tally.problems],
        "unknown_columns": list(rows.unknown),
    }


def _tell(plan: Plan, report: dict[str, Any], console: Console) -> None:
    """The report for people: what is wrong first, on standard error."""
    for one in report["problems"]:
        complain(f"line {one['line']}: {one['problem']}", "yellow")
    if (more := report["bad"] - len(report["problems"])) > 0:
        complain(f"and {more} more lines", "yellow")
    if report["unknown_columns"]:
        complain(f"ignored, because they mean nothing here: {', '.join(report['unknown_columns'])}", "yellow")
    said = ", ".join(f"{count} {kind}s" for kind, count in report["judgements"].items())
    skipped = ", ".join(f"{count} {reason}" for reason, count in report["skipped"].items())
    held = f"{report['lines']} lines: {report['exchanges']} exchanges, {said}"
    held += f", {report['without_judgement']} without a judgement" if report["without_judgement"] else ""
    held += f"; passed over: {skipped}" if skipped else ""
    if report["imported"]:
        console.print(f"Imported {escape(str(plan.file))}. {held}. The learner takes it from the log.", soft_wrap=True)
    elif plan.dry_run and not report["bad"]:
        console.print(f"{escape(str(plan.file))} can be imported. {held}.", soft_wrap=True)
    else:
        complain(
            f"nothing was imported: {report['bad']} of {report['lines']} lines are bad. Mend them, or leave them out "
            "with --skip-bad.",
            "red",
        )
