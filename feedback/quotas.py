"""Quotas by token bucket, each kept as one number: when the bucket is full again."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST = 50_000
"""Callers remembered; those who came longest ago are forgotten first, and begin with a full bucket."""

MINUTE_S = 60.0

TAKE = """
local time = redis.call('TIME')
local now, minute = time[1] * 1000000 + time[2], 60000000
local each = minute / ARGV[1]
local full = math.min(math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0)), now + minute)
local wait = full + each - now - minute
if wait > 0 then return math.ceil(wait) end
redis.call('SET', KEYS[1], string.format('%.0f', full + each), 'PX', math.ceil((full + each - now) / 1000))
return 0
"""
"""A Lua script for Redis: `Buckets.take` by the clock of Redis, of the bucket KEYS[1] that holds ARGV[1] and is forgotten
once it is full. Returns microseconds."""


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
