"""What the learner says: stories and the report to the board, numbers to Prometheus, lines to the log.

Everything here is told again or made anew when it is lost, and nothing of it decides anything.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from feedback.board import Story
from learner.board import LearnersBoard
from learner.ledger import Ledger, Update
from learner.metrics import LearnerMetrics
from learner.phases import Phases
from learner.state import State
from learner.watching import Lines, Watcher

REPORT = "policy"
REMEMBERED = 20
"""Updates whose figures a learner that starts shows: the newest has nearly all of them, and a report may be long."""

_log = logging.getLogger(__name__)


class Notices:
    """Tells the board, the metrics, the log and whoever watches what the learner does."""

    def __init__(
        self, board: LearnersBoard, state: State, metrics: LearnerMetrics, watchers: Sequence[Watcher] = (Lines(),)
    ) -> None:
        self.board = board
        self.state = state
        self.metrics = metrics
        self.watchers = [*watchers]
        self._activations: Mapping[int, float] = {}
        self._all_untold = False
        self.trouble: str | None = None
        """What is away, while it is."""

    def stories(self) -> bool:
        """Tell the board what happened to feedback since the last time, or all if it was emptied; true if anything."""
        told = False
        if self.board.forgot():
            if not self._all_untold:  # not again and again while the board takes nothing
                self.state.tell_all_again()
            self._all_untold = not self.board.begin_epoch()
            if self._all_untold:
                return False
            told = True
        while lines := self.state.untold():
            stories: defaultdict[str, list[Story]] = defaultdict(list)
            for line in lines:
                stories[line.feedback_id].append(line.step)
            if not self.board.write_stories(stories):
                break  # it is away: told as soon as it is back
            self.state.mark_told(lines)
            told = True
        return told

    def freshness(self) -> None:
        """Note which judgements have come to be served, by when the server first served each version."""
        activations = self.board.activations()
        if activations and activations != self._activations:
            for seconds in self.state.note_served(activations):
                self.metrics.freshness.observe(seconds)
        self._activations = activations

    def report(self, report: Mapping[str, Any], needed: int) -> None:
        """Show the learner's part of GET /v1/policy; `needed`: new judgements that start an update now."""
        self.board.set_report(REPORT, json.dumps(report, allow_nan=False))
        self.metrics.count(report["feedback"])
        self.metrics.due.set(needed)

    def went_on(self, phases: Phases, *, entered: bool, batch: bool) -> None:
        """Show that an update entered a phase, or brought a batch."""
        if entered:
            self._tell(lambda watcher: watcher.entered(phases))
        if batch:
            self._tell(lambda watcher: watcher.batch(phases))

    def over(self) -> None:
        """The update that was running ended or broke off."""
        self._tell(lambda watcher: watcher.over())

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        """To every watcher. One that fails is told nothing more: no update depends on who watches it."""
        for watcher in [*self.watchers]:
            try:
                what(watcher)
            except Exception:
                _log.exception("%s is told nothing more", type(watcher).__name__)
                self.watchers.remove(watcher)

    def remember(self, ledger: Ledger) -> None:
        """Show what a learner before this one showed of its updates."""
        for report in ledger.reports(REMEMBERED):
            self.metrics.show(report)
        last = ledger.ended()
        if last is not None:
            self.metrics.last_update.set(last.finished or 0.0)

    def learned(self, update: Update) -> None:
        """Show the figures of an update that reached the gate."""
        self._tell(lambda watcher: watcher.learned(update))
        report, gate = update.report or {}, update.gate or {}
        self.metrics.show(report)
        for phase, seconds in (report.get("seconds") or {}).items():
            self.metrics.seconds.labels(phase).observe(seconds)
        for check in gate.get("checks", ()):
            self.metrics.checks.labels(check["name"], check["verdict"]).inc()

    def ended(self, update: Update) -> None:
        """Count and say how an update ended."""
        self.metrics.updates.labels(update.status).inc()
        self.metrics.last_update.set(update.finished or 0.0)
        if update.status == "released":
            self._activations = {}  # the server may have noted this version before the learner did
            _log.info("update %d: v%s is released", update.number, update.version)
        else:
            _log.info("update %d ships nothing: %s", update.number, update.why)

    def waiting(self, error: Exception) -> None:
        """Say, once, what is away."""
        if str(error) != self.trouble:
            _log.warning("waiting, and trying again: %s", error)
        self.trouble = str(error)

    def recovered(self) -> None:
        """Say that what was away is back."""
        if self.trouble is not None:
            _log.info("going on: what was away is back")
        self.trouble = None
