"""How much of what happened is kept, by age and by size."""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Keep:
    """What is older than `age_s` seconds goes, and the oldest of what is more than `size` bytes. By default nothing does."""

    age_s: float = math.inf
    size: float = math.inf

    @classmethod
    def of(cls, days: float, megabytes: float) -> Keep:
        """From settings, of which 0 sets no bound."""
        return cls(days * DAY_S or math.inf, megabytes * 1e6 or math.inf)


EVERYTHING = Keep()
