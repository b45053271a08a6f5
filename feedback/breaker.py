"""When not to ask: what did not answer several times is left alone for a while, so that nobody waits for it in vain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

FAILURES = 3
"""In a row, after which nobody asks."""
REST_S = 1.0
"""After which one asks again; the others only once that one was answered."""

_log = logging.getLogger(__name__)


class Breaker:
    """Watches one service and says, once each, that it went, that it refuses things, and that it is back."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._failures = 0
        self._away_until: float | None = None
        self._probing = False
        self._refused_at: float | None = None

    def may_ask(self) -> bool:
        """Whether to ask now. Whoever gets a yes tells how it ended: answered, refused, failed or gave_up."""
        if self._away_until is None:
            return True
        if self._probing or self._clock() < self._away_until:
            return False
        self._probing = True
        return True

    def answered(self, wrote: bool) -> None:
        """It did what it was asked for; `wrote` when that was to keep something."""
        self._is_there()
        if wrote and self._refused_at is not None and self._clock() - self._refused_at > REST_S:
            self._refused_at = None
            _log.info("%s refuses nothing any more", self._name)

    def refused(self, error: Exception) -> None:
        """It is there, and does not do what it was asked for: it is full, or forbids it."""
        self._is_there()
        if self._refused_at is None:
            why = str(error).partition(", with args")[0]  # which quotes what it was to keep
            _log.warning("%s refuses what it is asked for (%s): going on without", self._name, why)
        self._refused_at = self._clock()

    def failed(self, error: Exception) -> None:
        """It did not answer, or not in time."""
        self._failures += 1
        self._probing = False
        if self._failures < FAILURES:
            return
        if self._away_until is None:
            why = str(error) or type(error).__name__
            _log.warning("%s is away (%s): going on without it, asking again every %g s", self._name, why, REST_S)
        self._away_until = self._clock() + REST_S

    def gave_up(self) -> None:
        """Whoever asked did not wait for the answer."""
        self._probing = False

    def _is_there(self) -> None:
        if self._away_until is not None and not self._probing:
            return  # an answer to what was asked before it went: whether it is back, the one that asks now will tell
        if self._away_until is not None:
            _log.info("%s is back", self._name)
        self._failures, self._away_until, self._probing = 0, None, False
