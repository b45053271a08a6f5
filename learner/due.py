"""When an update is due, and how many new judgements are still wanting."""

from __future__ import annotations

from collections.abc import Callable

from learner.board import LearnersBoard
from learner.config import LearnerConfig
from learner.ledger import Ledger, Update
from learner.state import State


class Due:
    """Weighs what came since the last update against the settings and the operator's wish."""

    def __init__(
        self, config: LearnerConfig, board: LearnersBoard, state: State, ledger: Ledger, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.board = board
        self.state = state
        self.ledger = ledger
        self.clock = clock

    def __bool__(self) -> bool:
        """Enough new judgements; or an operator asked, and there is anything at all to learn from."""
        if self.asked_for():
            return self.state.judgement_count(fresh=False) > 0
        return self.state.judgement_count(fresh=True) >= self.needed()

    def asked_for(self) -> bool:
        """Whether an operator asked for an update after the last one began."""
        last = self.ledger.last()
        return self.asked_at() > (0.0 if last is None else last.started)

    def asked_at(self) -> float:
        """When an operator last asked for an update, in epoch seconds; 0 when nobody did."""
        return self.board.update_asked() or 0.0

    def needed(self) -> int:
        """New judgements that start an update now.

        Fewer once the last update, or the first judgement, is long ago; and after an update whose reward model knew too
        little, which costs seconds to try again: else the last thumbs of many could wait while all of them would do.
        """
        last = self.ledger.last()
        if last is not None and _knew_too_little(last):
            return self.config.few
        since = last.finished if last is not None else self.state.oldest_fresh_at()
        if since is not None and self.clock() - since >= self.config.update_interval_s:
            return self.config.few
        return self.config.update_min_feedback


def _knew_too_little(update: Update) -> bool:
    checks = (update.gate or {}).get("checks", ())
    return any(check["name"] == "reward_model" and check["verdict"] == "fail" for check in checks)
