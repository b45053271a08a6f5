"""The updates, each a row in the state file, so that a kill at any moment neither ships one twice nor loses it.

    running ──gate says no──▶ refused
       │  └────an error─────▶ failed
       └─in the store───────▶ published ──it is served──▶ released
                                  └─the release was changed by hand meanwhile─▶ passed_over

`running` and `published` survive a restart and are then finished: a running update whose version lies in the store
already is published, any other is run again under its number.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from learner.material import LEARNED_FROM
from learner.state import State

if TYPE_CHECKING:
    from serving.adapters import Manifest

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Update:
    """One learner round; times in seconds since the epoch."""

    number: int
    status: str
    started: float
    finished: float | None
    current: int
    """The version that was released when it began: what its candidate replaces."""
    parent: int
    """The version that it goes on from: that one, unless this base does not speak it."""
    offsets: Json
    feedback: int
    """How many judgements it learned from; while it runs, how many there are."""
    version: int | None
    why: str | None
    """Why it shipped nothing, in a sentence."""
    report: Json | None
    gate: Json | None


@dataclass(frozen=True, slots=True)
class Learned:
    """What an update leaves behind besides weights."""

    report: Json
    gate: Json
    reached: Mapping[str, float]
    """Status of its feedback's stories → when it was reached."""


class Ledger:
    """Begins and ends updates, and adds them to the stories of the feedback they learned from."""

    def __init__(self, state: State) -> None:
        self.state = state

    def begin(self, *, current: int, parent: int, above: int, now: float) -> Update:
        """Open an update over all judgements that count now, or the interrupted one anew.

        `above` is the highest number that the store's versions know, whatever their base: it is not given again, neither by
        a state made anew nor to an update that was cut short when it had made a version, for another base than this.
        """
        offsets = self.state.offsets()
        with self.state.transaction() as db:
            running = "SELECT number FROM updates WHERE status = 'running'"
            db.execute(f"UPDATE feedback SET learned_in = NULL WHERE learned_in IN ({running})")
            (interrupted,) = db.execute(running).fetchone() or (0,)
            db.execute("DELETE FROM updates WHERE status = 'running'")
            highest = db.execute("SELECT coalesce(max(number), 0) FROM updates").fetchone()[0]
            number = interrupted if interrupted > above else max(highest, above) + 1
            self._mark_learned(number)
            count = self.state.judgement_count(fresh=False)
            db.execute(
                "INSERT INTO updates (number, status, started, current, parent, offsets, feedback)"
                " VALUES (?, 'running', ?, ?, ?, ?, ?)",
                (number, now, current, parent, json.dumps(offsets), count),
            )
        return self[number]

    def __getitem__(self, number: int) -> Update:
        update = self._one("WHERE number = ?", number)
        if update is None:
            raise KeyError(f"there is no update {number}")
        return update

    def last(self) -> Update | None:
        """The newest update, finished or not."""
        return self._one("")

    def ended(self) -> Update | None:
        """The newest update that is over."""
        return self._one("WHERE finished IS NOT NULL")

    def reports(self, newest: int) -> Iterator[Json]:
        """What so many of the newest updates that reached the gate reported, the oldest of them first."""
        query = "SELECT number, report FROM updates WHERE report IS NOT NULL ORDER BY number DESC LIMIT ?"
        for (report,) in self.state.db.execute(f"SELECT report FROM ({query}) ORDER BY number", (newest,)):
            yield json.loads(report)

    def unfinished(self) -> Update | None:
        """The update that is running or waits to be released."""
        return self._one("WHERE status IN ('running', 'published')")

    def used(self, update: Update, given: Mapping[str, str | None]) -> Update:
        """Of the feedback that the trainer was given: why it was left out, None where it was used. The rest was too much."""
        with self.state.transaction() as db:
            db.execute(
                f"UPDATE feedback AS f SET left_out = 'surplus' WHERE {LEARNED_FROM} AND learned_in <= :number"
                " AND left_out IS NOT 'surplus' AND id NOT IN (SELECT key FROM json_each(:given))",
                {**self.state.line, "number": update.number, "given": json.dumps(given)},
            )
            db.executemany(
                "UPDATE feedback SET left_out = ?1 WHERE id = ?2 AND left_out IS NOT ?1",
                [(reason, feedback_id) for feedback_id, reason in given.items()],
            )
            count = sum(reason is None for reason in given.values())
            db.execute("UPDATE updates SET feedback = ? WHERE number = ?", (count, update.number))
        return self[update.number]

    def refused(self, update: Update, learned: Learned, why: str, now: float) -> Update:
        """The gate said no."""
        with self.state.transaction():
            self._close(update, "refused", now, why=why, report=learned.report, gate=learned.gate)
            self._tell(update.number, learned.reached)
        return self[update.number]

    def published(self, update: Update, version: int, learned: Learned) -> Update:
        """Its candidate lies in the store as this version."""
        with self.state.transaction():
            self._close(update, "published", None, version=version, report=learned.report, gate=learned.gate)
            self._tell(update.number, learned.reached)
        return self[update.number]

    def released(self, update: Update, now: float) -> Update:
        """Its version is what the release names: only now does its feedback count as in a version."""
        with self.state.transaction():
            self._close(update, "released", now)
            self._tell(update.number, {"in_version": now}, update.version)
        return self[update.number]

    def passed_over(self, update: Update, why: str, now: float) -> Update:
        """Its version stays in the store and is not released. The next update learns from its feedback as from all."""
        with self.state.transaction():
            self._close(update, "passed_over", now, why=why)
        return self[update.number]

    def failed(self, update: Update, why: str, now: float) -> Update:
        """It broke on an error. Its feedback is no longer new, lest the same error be met again and again."""
        with self.state.transaction():
            self._close(update, "failed", now, why=why)
        return self[update.number]

    def of_this_base(self) -> bool:
        """Whether it is this base's updates that feedback is new to or not: else `adopt` them."""
        query = "SELECT 1 FROM learned_by WHERE policy = :policy AND base = :base"
        return self.state.db.execute(query, self.state.line).fetchone() is not None

    def adopt(self, manifests: Sequence[Manifest], approved: Collection[int]) -> None:
        """For a state made anew from the log, or of another base: the updates that this base's versions came from, oldest
        first.

        All feedback is new but what versions that were served (`approved`) have learned from. What was too much for an update
        its manifest does not say: the stories of a state made anew have it as used.
        """
        with self.state.transaction() as db:
            db.execute(
                "UPDATE feedback SET learned_in = NULL, left_out = NULL"
                " WHERE learned_in > 0 AND coalesce(policy, :policy) = :policy",
                self.state.line,
            )
            db.execute("INSERT OR REPLACE INTO learned_by VALUES (:policy, :base)", self.state.line)
            for manifest in manifests:
                number, offsets = number_of(manifest), _offsets(manifest)
                served = manifest.version in approved
                db.execute(
                    "INSERT OR IGNORE INTO updates (number, status, started, finished, current, parent, offsets, feedback,"
                    " version, report, gate) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        number,
                        "released" if served else "passed_over",
                        manifest.created,
                        manifest.created,
                        manifest.parent,
                        manifest.parent,
                        json.dumps(offsets),
                        manifest.feedback.get("count", 0),
                        manifest.version,
                        json.dumps(manifest.update),
                        json.dumps(manifest.gate),
                    ),
                )
                if served:
                    self._mark_learned(number, up_to=offsets)
                    self._leave_out(_left_out(manifest))
                    reached = dict.fromkeys(("in_reward_model", "in_update", "in_version"), manifest.created)
                    self._tell(number, reached, manifest.version)

    def _mark_learned(self, number: int, up_to: Mapping[str, int] | None = None) -> None:
        """The fresh judgements, all or up to a place in each partition of the log, are this update's."""
        bound = "" if up_to is None else "AND place <= (SELECT value FROM json_each(:up_to) WHERE key = f.partition)"
        self.state.db.execute(
            f"UPDATE feedback AS f SET learned_in = :number WHERE {LEARNED_FROM} AND learned_in IS NULL {bound}",
            {**self.state.line, "number": number, "up_to": json.dumps(up_to)},
        )

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """All that the updates before an adopted one had left out it used, but for this."""
        self.state.db.execute(
            "UPDATE feedback SET left_out = NULL WHERE left_out IS NOT NULL AND policy = :policy", self.state.line
        )
        self.state.db.executemany(
            "UPDATE feedback SET left_out = ? WHERE id = ?",
            [(why, feedback_id) for feedback_id, why in reasons.items()],
        )

    def _close(self, update: Update, status: str, finished: float | None, **columns: object) -> None:
        settings = {"status": status, "finished": finished, **columns}
        values = [json.dumps(value) if isinstance(value, Mapping) else value for value in settings.values()]
        assignments = ", ".join(f"{column} = ?" for column in settings)
        self.state.db.execute(f"UPDATE updates SET {assignments} WHERE number = ?", (*values, update.number))

    def _tell(self, number: int, reached: Mapping[str, float], version: int | None = None) -> None:
        """A line in the story of each judgement that the update used, where it is the first of that status."""
        for status, at in reached.items():
            self.state.db.execute(
                "INSERT OR IGNORE INTO stories (feedback_id, status, at, in_update, version)"
                " SELECT id, :status, :at, :number, :version"
                f" FROM feedback f WHERE {LEARNED_FROM} AND learned_in <= :number AND left_out IS NULL",
                {**self.state.line, "status": status, "at": at, "number": number, "version": version},
            )

    def _one(self, where: str, *values: object) -> Update | None:
        row = self.state.db.execute(
            "SELECT number, status, started, finished, current, parent, offsets, feedback, version, why, report, gate"
            f" FROM updates {where} ORDER BY number DESC LIMIT 1",
            values,
        ).fetchone()
        if row is None:
            return None
        number, status, started, finished, current, parent, offsets, feedback, version, why, report, gate = row
        return Update(
            number=number,
            status=status,
            started=started,
            finished=finished,
            current=current,
            parent=parent,
            offsets=_parsed(offsets) or {},
            feedback=feedback,
            version=version,
            why=why,
            report=_parsed(report),
            gate=_parsed(gate),
        )


def number_of(manifest: Manifest) -> int:
    """The update that made a version."""
    number = manifest.update["number"]
    assert isinstance(number, int)
    return number


def _offsets(manifest: Manifest) -> dict[str, int]:
    offsets = manifest.feedback.get("offsets")
    found = offsets.items() if isinstance(offsets, dict) else ()
    return {partition: offset for partition, offset in found if isinstance(offset, int)}


def _left_out(manifest: Manifest) -> dict[str, str]:
    left_out = manifest.feedback.get("left_out")
    found = left_out.items() if isinstance(left_out, dict) else ()
    return {feedback_id: why for feedback_id, why in found if isinstance(why, str)}


def _parsed(text: str | None) -> Json | None:
    parsed: Json | None = None if text is None else json.loads(text)
    return parsed
