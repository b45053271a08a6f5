"""Quotas by token bucket, each kept as one number: when the bucket is full again."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST = 50_000
"""Callers remembered; those who came longest ago are forgotten first, and begin with a full bucket."""

MINUTE_S = 60.0


class Buckets:
    """The buckets of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full: dict[str, float] = {}  # caller -> when full again; who came longest ago first

    def take(self, caller: str, per_minute: int) -> float:
        """Seconds until one may be taken; 0.0 when it just was. `per_minute` is at least 1."""
        now = self._clock()
        full = min(max(now, self._full.pop(caller, now)), now + MINUTE_S)  # a quota may have been made smaller
        wait = full + MINUTE_S / per_minute - now - MINUTE_S
        granted = wait <= 1e-9  # rounding
        self._full[caller] = full + MINUTE_S / per_minute if granted else full
        if len(self._full) > MOST:
            del self._full[next(iter(self._full))]
        return 0.0 if granted else wait
