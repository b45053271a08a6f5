"""The numbers in an update's report: as JSON takes them, and as Prometheus names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def jsonable(value: Any) -> Any:
    """The same with lists for tuples, and None for what JSON cannot say (NaN, infinity)."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report, as `heed_<part>_<name>`."""
    return {}
