"""The learner's loop: from feedback in the log to a version that the release names.

    absorb ──▶ enough new judgements? ──▶ train and judge ──────▶ publish ─────────▶ release
    intake.py  due.py                     trainer.py, update.py:  ../serving/        release.py names it;
    joining.py                            reward, improve, gate   adapters.py        ../serving/swap.py follows

A kill may come between any two lines. Each step looks at what is already so, in the state file, the store and the
release, and goes on from there; learner/ledger.py draws an update's life.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from feedback.log import Log, LogUnavailable
from learner.board import LearnersBoard
from learner.checkpoint import Checkpoints
from learner.config import LearnerConfig
from learner.due import Due
from learner.figures import jsonable
from learner.intake import Intake
from learner.ledger import Learned, Ledger, Update
from learner.live import served
from learner.metrics import LearnerMetrics
from learner.notices import Notices
from learner.page import keep_page, update_page
from learner.phases import Phases
from learner.release import Releaser
from learner.report import policy_report
from learner.state import State
from learner.stopping import Stopped, Stopping
from learner.watching import Lines, Watcher
from serving.adapters import AdapterStore, BadAdapter, ReleaseBroken, ReleaseRefused, StoreBusy

if TYPE_CHECKING:
    from learner.trainer import Trainer
    from learner.update import Candidate

JUDGEMENTS = 4096
"""An update is given at most so many of the newest judgements. How many replies they may be about, with which the reward
model's time grows, learner/prepare.py says."""
PROMPTS = 4096
"""Rollouts are made from at most so many of the newest distinct prompts."""
LIVE = 4096
"""At most so many of the newest replies that people were served may be experience."""
POLL_S = 0.25
GATHER_S = 0.05
"""After a hint, so that what comes in quick succession is absorbed together."""
LONGEST_WAIT_S = 60.0
BEAT_S = 1.0
"""Between two looks around while an update runs."""
REPORT_S = 5.0
"""Between two reports when nothing happens."""
REPORT_SHARE = 0.05
"""At most this share of the learner's time goes into reports, however much there is to count."""

AWAY = (LogUnavailable, StoreBusy, ReleaseBroken, OSError, sqlite3.OperationalError)
"""Faults of what the learner leans on (log, disk, store): it waits and tries again, it does not end."""

_log = logging.getLogger(__name__)


class Learner:
    """Keeps one policy learning. Everything happens on the thread that calls `run`."""

    def __init__(
        self,
        config: LearnerConfig,
        *,
        log: Log,
        board: LearnersBoard,
        store: AdapterStore,
        state: State,
        trainer: Trainer,
        metrics: LearnerMetrics,
        stopping: Stopping,
        watchers: Sequence[Watcher] = (Lines(),),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.board = board
        self.store = store
        self.state = state
        self.trainer = trainer
        self.stopping = stopping
        self.clock = clock
        self.intake = Intake(log, state, metrics, join_wait_s=config.serving.feedback.join_wait_s, clock=clock)
        self.ledger = Ledger(state)
        self.due = Due(config, board, state, self.ledger, clock)
        self.releaser = Releaser(store, trainer.base, log)
        self.notices = Notices(board, state, metrics, watchers)
        self.checkpoints = Checkpoints(config.folder / "checkpoints", trainer)
        self.phases: Phases | None = None
        self.looked = self.reported = self.report_took_s = 0.0
        self.news = self.remembered = False

    def run(self, until_idle: bool = False) -> None:
        """Learn until told to stop; with `until_idle`, until the log is drained and no update is due."""
        self.checkpoints.restore()
        wait_s = POLL_S
        while not self.stopping.is_set():
            try:
                busy = self.step()
            except Stopped:
                return
            except AWAY as error:
                self.say_away(error)
                self.stopping.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            self.notices.recovered()
            wait_s = POLL_S
            if not busy:
                if until_idle and not self.intake.log.away():
                    return
                if self.board.wait_for_work(POLL_S):
                    self.stopping.wait(GATHER_S)

    def step(self) -> bool:
        """Look around, then do the update that is due. False when there is nothing to do but wait."""
        more = self.look_around()
        if more:
            return True
        update = self.ledger.unfinished()
        if update is not None and update.status == "running":
            update = self.found_in_store(update)
        if update is not None and update.status == "published":
            return self.release(update).status != "published"
        if self.store.release().paused or not (update or self.due):
            return False
        self.update_once()
        return True

    def update_once(self) -> Update:
        """One learner round: learn from all judgements that count, and release a version or say why none ships."""
        update = self.begin()
        candidate = self.learn(update)
        if candidate is None:
            return self.fail(update)
        update = self.ledger[update.number]  # by now it is known how many judgements were used
        try:
            self.checkpoints.save(update.number, dict(update.offsets))
        except OSError as error:  # nothing leans on it: no reason to train all over again
            _log.warning("update %d: no checkpoint is kept: %s", update.number, error)
        if not candidate.gate.passed:
            return self.refuse(update, candidate)
        update = self.publish(update, candidate)
        return self.release(update)

    def look_around(self) -> bool:
        """Absorb what is new, mirror the release to the log, tell the board; true while the log has more."""
        self.looked = self.clock()
        more = self.intake.absorb()
        if not more and not self.ledger.of_this_base():
            self.ledger.adopt(self.releaser.made_by_updates(), self.store.release().approved)
            self.remembered = False
        if not self.remembered:
            self.notices.remember(self.ledger)
            self.remembered = True
        self.releaser.mirror()
        self.news = self.notices.stories() or self.news
        self.notices.freshness()
        wait_s = 0.0 if self.news or self.phases is not None else REPORT_S
        since_s = abs(self.clock() - self.reported)  # a clock may be set back
        if since_s >= max(wait_s, self.report_took_s / REPORT_SHARE):
            self.report()
        return more

    def report(self) -> None:
        """Show on the board what is going on."""
        self.reported = self.clock()
        doing = str(self.phases) if self.phases else self.notices.trouble
        release, needed = self.store.release(), self.due.needed()
        now = self.reported
        report = policy_report(self.state, self.ledger, release=release, now=now, needed=needed, doing=doing)
        self.notices.report(report, needed)
        self.news, self.report_took_s = False, self.clock() - now

    def say_away(self, error: Exception) -> None:
        """Say what is away, wherever it can still be said."""
        self.leave()
        self.notices.waiting(error)
        with contextlib.suppress(*AWAY):
            self.report()

    def begin(self) -> Update:
        """Open the next update, or the interrupted one anew."""
        release = self.store.release()
        now = max(self.clock(), self.due.asked_at())  # a wish that is fulfilled stays so, whatever the clock does
        update = self.ledger.begin(
            current=release.current,
            parent=self.releaser.speaks(release),
            above=self.releaser.highest_number(),
            now=now,
        )
        self.phases = Phases(update.number, self.clock)
        _log.info("update %d: learning from %d judgements", update.number, update.feedback)
        self.report()
        return update

    def learn(self, update: Update) -> Candidate | None:
        """Let the trainer make a candidate; None when it broke, which ends this update and not the learner."""
        judgements, prompts = self.state.judgements(JUDGEMENTS), self.state.prompts(PROMPTS)
        parent, seed = self.releaser.weights(update.parent), self.config.seed + update.number
        live = served(self.state, LIVE, update.parent) if self.config.live_share else ()
        try:
            with self.stopping.at_once():
                candidate = self.trainer.learn(
                    judgements, prompts, parent=parent, seed=seed, served=live, progress=self.progress
                )
        except Exception:
            _log.exception("update %d failed", update.number)
            return None
        used = {one.feedback_id: candidate.left_out.get(one.feedback_id) for one in judgements}
        self.ledger.used(update, used)  # before it is published: of what a kill leaves there nobody else knows
        return candidate

    def progress(self, phase: str, fraction: float, batch: Mapping[str, float] | None = None) -> None:
        """The trainer calls this again and again, so that the learner goes on listening while it trains."""
        if self.stopping.is_set():
            raise Stopped
        assert self.phases is not None
        entered = self.phases.enter(phase, fraction)
        if batch is not None:
            self.phases.batches.append(batch)
        self.notices.went_on(self.phases, entered=entered, batch=batch is not None)
        if self.clock() - self.looked < BEAT_S:
            return
        try:
            self.look_around()
        except AWAY as error:
            self.notices.waiting(error)

    def fail(self, update: Update) -> Update:
        """The trainer broke; its traceback is in the learner's log."""
        why = f"update {update.number} failed (the learner's log says on what)"
        return self.ended(self.ledger.failed(update, why, self.clock()))

    def refuse(self, update: Update, candidate: Candidate) -> Update:
        """The gate said no: nothing ships, and everyone can read why."""
        said = " ".join(check.sentence for check in candidate.gate.checks if check.verdict == "fail")
        why = f"the gate said no to update {update.number}: {said}"
        page = self.page(update, candidate)
        try:
            if page is not None:
                place = keep_page(self.config.folder / "reports", update.number, page)
                _log.info("update %d: its report is %s", update.number, place)
        except OSError as error:  # nothing leans on it
            _log.warning("update %d: no report is kept: %s", update.number, error)
        update = self.ledger.refused(update, self.learned(candidate), why, self.clock())
        self.notices.learned(update)
        return self.ended(update)

    def publish(self, update: Update, candidate: Candidate) -> Update:
        """Put a candidate that passed the gate into the store, with what it came from. Served to nobody yet."""
        learned = self.learned(candidate)
        version = self.store.publish(
            candidate.weights,
            parent=update.parent,
            base=self.trainer.base,
            feedback={
                "count": update.feedback,
                "offsets": dict(update.offsets),
                # for a state made anew; of what was too much there may be thousands
                "left_out": {id_: why for id_, why in candidate.left_out.items() if why != "surplus"},
            },
            update={**learned.report, "number": update.number},
            gate=learned.gate,
            page=lambda version: self.page(update, candidate, version),
            above=max(self.state.highest_version(), self.releaser.highest_mirrored),
        )
        if self.store.page(version).exists():
            _log.info("update %d: its report is %s", update.number, self.store.page(version))
        update = self.ledger.published(update, version, learned)
        self.notices.learned(update)
        return update

    def found_in_store(self, update: Update) -> Update:
        """A running update whose version was published before a kill is published; any other stays running."""
        manifest = self.releaser.made_by(update.number)
        if manifest is None:
            return update
        reached = dict.fromkeys(("in_reward_model", "in_update"), manifest.created)
        update = self.ledger.published(update, manifest.version, Learned(manifest.update, manifest.gate, reached))
        self.notices.learned(update)
        return update

    def release(self, update: Update) -> Update:
        """Have the release name a published version, which servers follow. While a pause holds it back it stays published."""
        assert update.version is not None
        reason = f"update {update.number}: {update.feedback} judgements, passed the gate"
        try:
            outcome = self.releaser.promote(update.version, instead_of=update.current, reason=reason)
            why = f"v{update.version} waits in the store: the release was changed by hand during update {update.number}"
        except (BadAdapter, ReleaseRefused) as error:
            outcome, why = "passed_over", f"v{update.version} cannot be served: {error}"
        if outcome == "paused":
            self.leave()
            return update
        if outcome == "passed_over":
            return self.ended(self.ledger.passed_over(update, why, self.clock()))
        self.board.say_released()
        update = self.ended(self.ledger.released(update, self.clock()))
        self.store.prune()
        return update

    def page(self, update: Update, candidate: Candidate, version: int | None = None) -> str | None:
        """The update as a page for people: HTML; None where it cannot be drawn, for which no update is given up."""
        learned = self.learned(candidate)
        try:
            return update_page(update, version, learned.report, learned.gate, candidate.exhibits, self.clock())
        except Exception:
            _log.exception("update %d: no report can be made of it", update.number)
            return None

    def learned(self, candidate: Candidate) -> Learned:
        """What an update leaves behind besides weights, as JSON takes it."""
        assert self.phases is not None
        report, gate = jsonable(candidate.report), jsonable(dataclasses.asdict(candidate.gate))
        return Learned(report, gate, self.phases.reached())

    def ended(self, update: Update) -> Update:
        """Tell everyone how an update ended."""
        self.leave()
        self.notices.ended(update)
        self.report()
        return update

    def leave(self) -> None:
        """No update is running any more."""
        self.phases = None
        self.notices.over()
