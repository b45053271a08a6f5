"""What people think of a version, as PromQL: the share that liked its replies, its mean stars, and how surely each is known.

Over the reader's window, with 95% intervals; a version of which nobody said anything then has no line. The counters know the
role of the version that spoke; which version that was a recording rule adds (deploy/alerts.yml).
"""

from __future__ import annotations

from deploy.dashboards.panels import WINDOW, Query

Z = 1.96
"""Standard errors to either side of 95%."""


def said(values: str) -> str:
    """How often these values were given, by version: a regular expression of thumbs (`up`, `down`) and stars (`1` to `5`)."""
    recorded = f'version:heed_feedback_value:increase1m{{policy="$policy",value=~"{values}"}}'
    return f"sum by (version) (sum_over_time({recorded}[{WINDOW}]))"


LIKED, DISLIKED = said("up|4|5"), said("down|1|2|3")
"""As in `liked` of GET /v1/policy: a thumb up, four stars, five stars."""
JUDGED, STARRED = f"({said('.+')} > 0)", f"({said('[1-5]')} > 0)"
_ABOVE = f"((2 * {said('5')} + {said('4')} - {said('2')} - 2 * {said('1')}) / {STARRED})"
"""Mean stars above three: written so, four counts are enough."""
_SQUARE = f"((4 * {said('[15]')} + {said('[24]')}) / {STARRED})"
"""Mean square of the stars' distance from three."""
_STARS_ERROR = f"sqrt(clamp_min({_SQUARE} - {_ABOVE} ^ 2, 0) / {STARRED})"


def liked(side: int = 0) -> str:
    """The share liked; its lower bound for -1, its upper one for 1, by Wilson (JASA 22, 1927): right for few and for 0 or 1."""
    if side == 0:
        return f"{LIKED} / {JUDGED}"
    spread = f"{Z} * sqrt({LIKED} * {DISLIKED} / {JUDGED} + {Z**2 / 4:.4f})"
    return f"({LIKED} + {Z**2 / 2:.4f} {'-' if side < 0 else '+'} {spread}) / ({JUDGED} + {Z**2:.4f})"


def stars(side: int = 0) -> str:
    """Mean stars; its lower bound for -1, its upper one for 1, by the normal distribution: loose below some thirty ratings."""
    if side == 0:
        return f"3 + {_ABOVE}"
    return f"3 + {_ABOVE} {'-' if side < 0 else '+'} {Z} * {_STARS_ERROR}"


CURRENT = 'heed_version_info{policy="$policy",role="current"}'
HOLDERS = {
    "current": CURRENT,
    "previous": f"topk(1, max by (version) (max_over_time(timestamp({CURRENT})[{WINDOW}:])) unless on (version) {CURRENT})",
    "base": 'heed_version_info{policy="$policy",role="base"}',
}
"""Role → the version that has it at a moment; previous: the one that was current last, loaded or not."""


def of_role(role: str, by_version: str) -> str:
    """An opinion, of the version that had this role at the time."""
    return f"max({by_version} and on (version) {HOLDERS[role]})"


COLUMNS = [
    Query('max by (version, role) (heed_version_info{policy="$policy",role=~"current|base"})', ""),
    Query(liked(), "liked"),
    Query(liked(-1), "liked, at least"),
    Query(liked(1), "liked, at most"),
    Query(JUDGED, "judged"),
    Query(stars(), "stars"),
    Query(stars(-1), "stars, at least"),
    Query(stars(1), "stars, at most"),
    Query(STARRED, "rated"),
]
"""Of the table of versions; bounds with 95% confidence."""
BANDS = {-1: "low", 0: "", 1: "high"}
