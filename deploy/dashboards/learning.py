"""The dashboard "Learning": is it getting better, from what does it learn, and (training.py) can it be trusted?"""

from __future__ import annotations

from collections.abc import Callable

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.opinions import BANDS, COLUMNS, liked, of_role, stars
from deploy.dashboards.panels import COLOURS, Panel, Query, banded, board, lines, rows, seen, share
from deploy.dashboards.training import pace, policy, reward_model


def learning() -> Dashboard:
    """For whoever wants to know whether people are better off."""
    return board(
        "heed-learning",
        "Heed: Learning",
        "What people think of each version, what they say, and how the reward model and the policy learn from it.",
        {
            "What people think": opinions(),
            "What people say": feedback(),
            "The reward model": reward_model(),
            "The policy": policy(),
            "Pace": pace(),
        },
        refresh="1m",
    )


def opinions() -> list[Panel]:
    return [
        rows(
            "The current version beside the one before and the base (v0)",
            "Of thumbs and ratings within the window, for each version of which anything was said: the share liked (thumb up, 4 "
            "or 5 stars) and the mean stars, each with the bounds of its 95% confidence interval and how many were counted. Not "
            "among them is what was said in the minute of a swap, or of versions before both: GET /v1/policy counts all.",
            "the current version's `at least` is above the `at most` of the others: it is surely better.",
            "its `at most` is below their `at least`: roll it back (`heed adapters rollback`). Where intervals overlap, "
            "nobody knows yet: wait, or take a longer window.",
            COLUMNS,
            by="version",
            units={
                **dict.fromkeys(("liked", "liked, at least", "liked, at most"), "percentunit"),
                **dict.fromkeys(("judged", "rated"), "short"),
            },
        ),
        banded(
            "Share liked",
            "Of thumbs and ratings within the window, the share that is a thumb up, four stars or five (95% interval by "
            "Wilson), for the version that was current at the time, for the one before it, and for the base. Marks show when "
            "which version spoke.",
            "blue (current) is above orange (the one before) and grey (the base), and the bands come apart.",
            "blue below the others with no overlap. A wide band after a swap is right: little was said yet.",
            "percentunit",
            by_role(liked),
            bottom=0,
            top=1,
        ),
        banded(
            "Mean stars",
            "Mean of the ratings within the window, 1 to 5 (95% interval by the normal distribution: with fewer than thirty "
            "ratings it is too narrow).",
            "as for the share liked.",
            "stars fall while the share liked rises: thumbs and ratings come from different people, or of different replies.",
            "none",
            by_role(stars),
            bottom=1,
            top=5,
        ),
    ]


def by_role(opinion: Callable[[int], str]) -> list[Query]:
    """Three lines a role: the opinion, and its bounds."""
    return [
        Query(of_role(role, opinion(side)), f"{role} {bound}".strip())
        for role in COLOURS
        for side, bound in BANDS.items()
    ]


def feedback() -> list[Panel]:
    # not by what has joined, which falls where the state keeps things for a time; the most, for learners may read one log
    apart = (
        'max(delta(heed_feedback_fates{fate="pending"}[$window])'
        ' + on (job, instance) delta(heed_feedback_dropped_total{reason="no_exchange"}[$window]))'
    )
    accepted = seen('heed_feedback_total{outcome="accepted"}')
    return [
        lines(
            "Feedback by kind",
            "Feedback accepted within the window, by kind.",
            "several kinds, from many people.",
            "none: nobody sees the buttons, or your application does not send what they press.",
            "short",
            [Query(seen('heed_feedback_total{outcome="accepted",kind!="unknown"}', "kind"), "{{kind}}")],
            bars=True,
        ),
        lines(
            "Join rate",
            "Of the feedback accepted within the window, the share that does not wait for its exchange.",
            "1, or near it; above it while what had waited before is joined.",
            "below 0.9: exchanges are not kept (`store: false`, a full outbox), or they come late.",
            "percentunit",
            [Query(f"1 - {share(apart, accepted)}", "joined")],
            top=1,
        ),
        lines(
            "Dropped",
            "Feedback and events within the window that do not count, by reason.",
            "none.",
            "no_exchange: its exchange never came (HEED_JOIN_WAIT_S). conflict: the same id with another body. malformed, "
            "newer_schema: something else writes to the log, or a newer Heed does.",
            "short",
            [Query(seen("heed_feedback_dropped_total", "reason"), "{{reason}}")],
            bars=True,
        ),
        lines(
            "Not accepted",
            "Feedback within the window that the server answered otherwise than with a receipt of its own, by outcome.",
            "repeated and retracted: clients ask again, people change their minds.",
            "unknown_reply, not_stored, malformed, conflict: a client sends what it should not. unavailable: the log is away "
            "and the outbox full.",
            "short",
            [Query(seen('heed_feedback_total{outcome!="accepted"}', "outcome"), "{{outcome}}")],
            bars=True,
        ),
        lines(
            "Judgements waiting",
            "New judgements (joined thumbs, ratings, preferences), and how many of them start an update now.",
            "a saw: waiting rises to due, an update begins, waiting falls.",
            "waiting stays above due: paused, or stuck; GET /v1/policy says `why`.",
            "short",
            [Query("heed_judgements_waiting", "waiting"), Query("heed_judgements_due", "due")],
        ),
        lines(
            "Heaviest rater",
            "Share of the reward model's training weight that one rater has, after a rater who said more than a tenth of "
            "all was held to that (with fewer than twenty raters: to twice an equal part).",
            "below 0.2.",
            "above 0.3 with many users: one person, or one script, teaches everybody's model.",
            "percentunit",
            [Query("heed_rater_weight_top_share", "heaviest")],
            top=1,
        ),
    ]
