"""Work that must be done between two steps of the engine, by whoever makes the steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Commands:
    """Other threads leave commands here; the engine runs them before its next step."""

    def __init__(self, stepping: threading.RLock, work: threading.Condition) -> None:
        """`stepping` is held during each step; `work` wakes the engine's thread."""
        self._stepping = stepping
        self._work = work
        self._left: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._left)

    def run(self) -> None:
        """Run what was left; called between two steps, with `stepping` held."""
        while self._left:
            self._left.popleft()()

    def between_steps(
        self, command: Callable[[], None], stepper: threading.Thread | None, timeout: float | None
    ) -> None:
        """Have a command run, and wait for it. `stepper`: the thread that makes the steps, if one does.

        What the command raises, rises here. Raises TimeoutError when no step ends in time; the command is then
        withdrawn.
        """
        done: Future[None] = Future()
        with self._work:
            self._left.append(lambda: _fulfil(done, command))
            self._work.notify()
        if stepper is None or stepper is threading.current_thread():
            while not done.done():
                if self._stepping.acquire(timeout=0.05):  # else whoever holds it runs the command
                    try:
                        self.run()
                    finally:
                        self._stepping.release()
        try:
            done.result(timeout)
        except TimeoutError:
            done.cancel()
            raise


def _fulfil(done: Future[None], command: Callable[[], None]) -> None:
    if done.set_running_or_notify_cancel():
        try:
            command()
        except BaseException as error:  # it belongs to whoever waits
            done.set_exception(error)
        else:
            done.set_result(None)
