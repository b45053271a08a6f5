"""The board as the learner asks it: from one thread without an event loop, each call waiting for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from feedback.board import RELEASE_HINT, WORK_HINT, Board, Story


class LearnersBoard:
    """What the learner needs of a board, one call at a time."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._runner = asyncio.Runner()

    def update_asked(self) -> float | None:
        """When an update was last asked for."""
        return self._runner.run(self._board.update_asked())

    def activations(self) -> dict[int, float]:
        """Version → when it was first served."""
        return self._runner.run(self._board.activations())

    def forgot(self) -> bool:
        """Whether what was told in this epoch may be gone."""
        return self._runner.run(self._board.forgot())

    def begin_epoch(self) -> bool:
        """Note that from here on everything is told; True once that is noted."""
        return self._runner.run(self._board.begin_epoch())

    def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> bool:
        """Add steps to the stories of feedbacks (by id); True once all are written."""
        return self._runner.run(self._board.write_stories(stories))

    def set_report(self, name: str, report: str) -> None:
        """Show a report (JSON) in place of the one before."""
        self._runner.run(self._board.set_report(name, report))

    def say_released(self) -> None:
        """Have servers look at the release at once."""
        self._runner.run(self._board.hint(RELEASE_HINT))

    def wait_for_work(self, at_most_s: float) -> bool:
        """Wait until there may be something to do; False when nobody said so in `at_most_s`."""
        return self._runner.run(self._board.wait_for_hint(WORK_HINT, at_most_s))

    def close(self) -> None:
        self._runner.run(self._board.close())
        self._runner.close()
