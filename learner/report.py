"""The learner's part of `GET /v1/policy`: what was learned from what, and why nothing ships when nothing does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from feedback.events import Release
from learner.ledger import Ledger, Update
from learner.material import LEARNED_FROM, live
from learner.state import State


def policy_report(
    state: State, ledger: Ledger, *, release: Release, now: float, needed: int, doing: str | None
) -> dict[str, Any]:
    """JSON-able. `needed` is how many new judgements start the next update, `doing` the update that is running."""
    last = ledger.last()
    return {
        "seen_at": now,
        "why": doing or why_nothing_ships(state, last, release, needed),
        "last_update": last and _of_update(last),
        "gate": last and last.gate,
        "freshness": freshness(state),
        "feedback": feedback_counts(state),
        "liked": liked(state),
    }


def why_nothing_ships(state: State, last: Update | None, release: Release, needed: int) -> str | None:
    """A sentence, or None when the last thing that happened is a new version and nothing was said since."""
    fresh = state.judgement_count(fresh=True)
    if release.paused:
        return f"paused by {_who_paused(release)}: feedback is kept, and no update starts until it is resumed"
    if last is None and fresh == 0:
        return _why_no_judgements(state)
    waiting = f"{fresh} of the {needed} new judgements that start an update"
    if last is not None and last.why is not None:
        return f"{last.why}{'' if last.why.endswith('.') else ';'} {waiting}"
    if last is None or fresh:
        return waiting
    return None


def feedback_counts(state: State) -> dict[str, Any]:
    """How much feedback there is, by kind and by fate."""
    counted = state.counted()
    return {
        "by_kind": dict(state.db.execute("SELECT kind, count(*) FROM feedback GROUP BY kind")),
        "by_status": dict(state.db.execute("SELECT status, count(*) FROM feedback GROUP BY status")),
        "dropped": dropped(state),
        "duplicates": counted.get("duplicate", 0),
        "late": counted.get("late", 0),
        "learned_from": _learned_from(state),
        "new": state.judgement_count(fresh=True),
        "not_learned_from": _not_learned_from(state),
    }


def dropped(state: State) -> dict[str, int]:
    """Feedback and events that do not count, by reason. A duplicate is no loss and not among them, nor is what was late."""
    totals = Counter({name: count for name, count in state.counted().items() if name not in ("duplicate", "late")})
    totals.update(
        dict(state.db.execute("SELECT reason, count(*) FROM feedback WHERE status = 'dropped' GROUP BY reason"))
    )
    return dict(totals)


def liked(state: State) -> dict[str, dict[str, float]]:
    """Of the thumbs and ratings of live replies that count, by the version that spoke: the share of thumbs up and of 4 or 5
    stars."""
    rows = state.db.execute(
        "SELECT e.version, avg(CASE f.kind WHEN 'thumb' THEN f.value = 1 ELSE f.value >= 4 END), count(*)"
        " FROM feedback f JOIN exchanges e ON e.reply_id = f.reply_id"
        " WHERE f.status = 'joined' AND f.kind IN ('thumb', 'rating') AND f.aspect = 'overall'"
        f" AND f.policy = :policy AND f.base = :base AND {live('e')} GROUP BY e.version ORDER BY e.version",
        state.line,
    )
    return {f"v{version}": {"share": round(share, 4), "count": count} for version, share, count in rows}


def freshness(state: State, newest: int = 1000) -> dict[str, float | int | None]:
    """Seconds from acceptance to being served, over the newest judgements that got there."""
    rows = state.db.execute(
        "SELECT fresh_s FROM feedback WHERE fresh_s IS NOT NULL ORDER BY at DESC, id DESC LIMIT ?", (newest,)
    ).fetchall()
    seconds = sorted(row[0] for row in rows)
    return {"p50": _quantile(seconds, 0.5), "p95": _quantile(seconds, 0.95), "count": len(seconds)}


def _quantile(ordered: list[float], share: float) -> float | None:
    """Nearest rank: a value that was seen."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def _learned_from(state: State) -> int:
    """Feedback that counts, but for what the last update left out."""
    query = f"SELECT count(*) FROM feedback f WHERE {LEARNED_FROM} AND f.left_out IS NULL"
    number: int = state.db.execute(query, state.line).fetchone()[0]
    return number


def _not_learned_from(state: State) -> dict[str, int]:
    """Joined feedback that is kept and not learned from (yet), by reason."""
    rows = state.db.execute(
        "SELECT coalesce(untrained, left_out, 'other_policy') AS why, count(*) FROM feedback f"
        f" WHERE status = 'joined' AND NOT coalesce({LEARNED_FROM} AND left_out IS NULL, 0) GROUP BY why",
        state.line,
    )
    return dict(rows)


def _why_no_judgements(state: State) -> str:
    if not state.db.execute("SELECT 1 FROM feedback LIMIT 1").fetchone():
        return "no feedback yet"
    if state.db.execute("SELECT 1 FROM feedback WHERE status = 'pending' LIMIT 1").fetchone():
        return "no feedback to learn from yet: what came waits for the exchanges it speaks of"
    return "no feedback to learn from yet: it takes thumbs, ratings or preferences on replies of this policy"


def _who_paused(release: Release) -> str:
    pauses = [change for change in release.changes if change.action == "pause"]
    if not pauses:
        return "an operator"
    return pauses[-1].by + (f" ({pauses[-1].reason})" if pauses[-1].reason else "")


def _of_update(update: Update) -> Mapping[str, Any]:
    return {
        "number": update.number,
        "status": update.status,
        "started": update.started,
        "finished": update.finished,
        "parent": f"v{update.parent}",
        "version": None if update.version is None else f"v{update.version}",
        "feedback": update.feedback,
        "why": update.why,
        "report": update.report,
    }
