"""What people think of a version, as PromQL: the share that liked its replies, its mean stars, and how surely each is known.

Counted by the role of the version that spoke (`current`, `previous`, `base`) within the reader's window; 95% intervals.
A role of which nobody said anything has no line.
"""

from __future__ import annotations

from deploy.dashboards.panels import Query, seen

Z = 1.96
"""Standard errors to either side of 95%."""


def said(values: str) -> str:
    """How often these values were given, by role: a regular expression of thumbs (`up`, `down`) and stars (`1` to `5`)."""
    roles = 'role=~"current|previous|base"'
    return seen(f'heed_feedback_value_total{{policy="$policy",{roles},value=~"{values}"}}', "role")


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


COLUMNS = [
    Query(liked(), "liked"),
    Query(liked(-1), "liked, at least"),
    Query(liked(1), "liked, at most"),
    Query(JUDGED, "judged"),
    Query(stars(), "stars"),
    Query(stars(-1), "stars, at least"),
    Query(stars(1), "stars, at most"),
    Query(STARRED, "rated"),
]
"""Of the table of roles; bounds with 95% confidence."""
BANDS = {-1: "low", 0: "middle", 1: "high"}
