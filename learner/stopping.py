"""How the learner is told to stop: by an event, and at once where it would not look at one for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


# no Exception, so that no `except Exception` on its way takes it for a fault
class Stopped(BaseException):
    """The learner was told to stop. An update that this ends is run again at the next start."""


class Stopping(threading.Event):
    """Set once the learner is to stop."""

    def __init__(self) -> None:
        super().__init__()
        self._at_once = False

    def on_signal(self, *_: object) -> None:
        """A signal handler: sets the event, and inside `at_once` raises Stopped wherever the main thread stands."""
        self.set()
        if self._at_once:
            self._at_once = False
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work that leaves nothing behind when it is cut anywhere."""
        self._at_once = True
        try:
            if self.is_set():
                raise Stopped
            yield
        finally:
            self._at_once = False
