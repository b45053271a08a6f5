"""From the log into the state: reading, and knowing when there is nothing left to read."""

from __future__ import annotations

import math
from collections.abc import Callable

from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import Log, LogUnavailable, Offsets
from learner.metrics import LearnerMetrics
from learner.state import State

BATCH = 1000
"""Events of one transaction."""
KEEP_S = 60.0
"""Between two looks at what is not to be kept any more."""


class Intake:
    """Reads exchanges and feedback into the state, each event once."""

    def __init__(
        self, log: Log, state: State, metrics: LearnerMetrics, *, join_wait_s: float, clock: Callable[[], float]
    ) -> None:
        """`join_wait_s`: seconds that feedback waits for the exchange it speaks of."""
        self.log = log
        self.state = state
        self.metrics = metrics
        self.join_wait_s = join_wait_s
        self.clock = clock
        self.started = clock()
        self.tidied = -math.inf

    def absorb(self) -> bool:
        """Take a batch of each topic in; true while there is more to read. Raises LogUnavailable."""
        more = False
        for topic in (EXCHANGES, FEEDBACK):
            end = self.log.end(topic)
            self.refuse_another_log(end)
            records = self.log.read(topic, self.state.offsets(), BATCH) if self.lag(end) else []
            if records:
                self.state.absorb(records, self.clock())
            lag = self.lag(end)
            self.metrics.lag.labels(topic).set(lag)
            more = more or lag > 0
        more = more or self.keep()
        if self.is_read(EXCHANGES):
            self.state.give_up_waiting(self.clock() - self.join_wait_s, self.clock())
        return more

    def keep(self) -> bool:
        """Now and then let go of what is not to be kept; true while there is more of it."""
        if abs(self.clock() - self.tidied) < KEEP_S or not (self.is_read(EXCHANGES) and self.is_read(FEEDBACK)):
            return False
        more = self.state.keep(self.clock(), self.join_wait_s)
        if not more:
            self.tidied = self.clock()
        return more

    def is_read(self, topic: str) -> bool:
        """Whether an event that is not in the state is nowhere. A log that shows no end may only be away for now."""
        end = self.log.end(topic)
        if not any(end.values()):
            return self.clock() - self.started > self.join_wait_s
        return self.lag(end) == 0

    def lag(self, end: Offsets) -> int:
        """How many events before `end` are not in the state yet."""
        reached = self.state.offsets()
        return sum(max(0, offset - reached.get(partition, 0)) for partition, offset in end.items())

    def refuse_another_log(self, end: Offsets) -> None:
        """Raises LogUnavailable where the log ends before what is learned already."""
        reached = self.state.offsets()
        for partition, offset in end.items():
            if offset < reached.get(partition, 0):
                raise LogUnavailable(
                    f"the log of {partition} ends at {offset}, before {reached[partition]}, which is learned already: it "
                    "was replaced or restored from a copy. Put the right one back, or begin anew with heed learn --rebuild."
                )
