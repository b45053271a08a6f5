"""An update as it goes by, for whoever sits in front of it: a live table in a terminal, else lines in the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from learner.ledger import Update
from learner.phases import Phases

SHOWN = 20
"""Batches that the table shows, the newest."""
COLUMNS = {
    "score": ("score", "{:+.2f}"),
    "KL": ("kl", "{:.2f}"),
    "explained": ("explained_variance", "{:.2f}"),
    "clipped": ("clipped", "{:.1%}"),
}
"""Head of a column → the figure of a batch, and how it is written."""

_log = logging.getLogger(__name__)


class Watcher:
    """Is told how an update goes. It decides nothing, and may be told of one that never ends."""

    def entered(self, phases: Phases) -> None:
        """A phase began that was not seen in this update before."""

    def batch(self, phases: Phases) -> None:
        """The last of `phases.batches` is new."""

    def learned(self, update: Update) -> None:
        """The update reached the gate."""

    def over(self) -> None:
        """The update ended or broke off. May be said more than once."""


class Lines(Watcher):
    """Into the log."""

    def entered(self, phases: Phases) -> None:
        _log.info("update %d: %s", phases.number, phases.phase)

    def batch(self, phases: Phases) -> None:
        told = ", ".join(f"{head} {text}" for head, text in cells(phases.batches[-1]).items())
        _log.info("update %d: batch %d: %s", phases.number, len(phases.batches), told)


class LiveTable(Watcher):
    """A table that grows by a row a batch. What the log says meanwhile is printed above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.moved: list[logging.StreamHandler[Any]] = []
        """Handlers of the log that write to the terminal, which would tear the table."""

    def entered(self, phases: Phases) -> None:
        if self.live is not None:
            return
        # only what goes to the terminal anyway is drawn above the table: a log that goes into a file stays there
        self.live = Live(
            console=self.console,
            refresh_per_second=2,
            get_renderable=lambda: picture(phases),
            redirect_stderr=sys.stderr.isatty(),
        )
        self.moved = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr and sys.stderr.isatty()
        ]
        self.live.start()
        self._follow()

    def over(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            self._follow()

    def _follow(self) -> None:
        """Standard error is another object while the table is drawn."""
        for handler in self.moved:
            handler.setStream(sys.stderr)


def picture(phases: Phases) -> Table:
    """The update so far."""
    table = Table(title=f"update {phases.number}: {phases.phase} {phases.fraction:.0%}", title_justify="left")
    for head in ("batch", *COLUMNS, "seconds"):
        table.add_column(head, justify="right")
    for number, batch in [*enumerate(phases.batches, 1)][-SHOWN:]:
        table.add_row(str(number), *cells(batch).values())
    spent = [f"{phase} {seconds:.0f} s" for phase, seconds in phases.seconds().items()]
    table.caption = ", ".join(spent)
    return table


def cells(batch: Mapping[str, float]) -> dict[str, str]:
    """The figures of a batch, by the heads of their columns; "–" for those that the last batch does not have."""
    told = {head: form.format(batch[name]) if name in batch else "–" for head, (name, form) in COLUMNS.items()}
    return told | {"seconds": f"{batch.get('rollouts_s', 0.0) + batch.get('steps_s', 0.0):.1f}"}
