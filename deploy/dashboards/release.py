"""The dashboard "Release": which version speaks, what became of updates, and what the gate said."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards import panels
from deploy.dashboards.panels import Panel, Query, board, lines, number, quantiles, rate, reigns, seen, share


def release() -> Dashboard:
    """For whoever answers for what users are served."""
    return board(
        "heed-release",
        "Heed: Release",
        "Which versions speak, how updates ended, what the gate said, and swaps.",
        {"Versions": versions(), "Updates and the gate": updates(), "Swaps": swaps()},
        refresh="1m",
    )


def versions() -> list[Panel]:
    return [
        reigns(
            "The version that speaks",
            "From when to when each version was the current one on some server; no bar while the base speaks alone.",
            "one bar follows another, and two overlap for seconds at most.",
            "an older version comes back: a rollback. Two go on side by side: a server did not take up the release.",
            Query(panels.VERSIONS, "{{version}}"),
        ),
        lines(
            "Chats by version's role",
            "Chats a second, by what the version that spoke is to the release.",
            "nearly all current (base: before the first version); previous falls to nothing within seconds of a swap.",
            "previous or older that stays: clients pin a version (`model: default@v3`), or a server did not swap.",
            "reqps",
            [Query(rate('heed_version_requests_total{policy="$policy"}', "role"), "{{role}}")],
            width=12,
        ),
        lines(
            "Versions loaded",
            "On how many servers a version is the current one, the one before, and so on.",
            "current (or base) on every server.",
            "servers that differ for more than seconds.",
            "short",
            [Query('sum by (role) (heed_version_info{policy="$policy"})', "{{role}}")],
            width=12,
        ),
    ]


def updates() -> list[Panel]:
    return [
        lines(
            "Updates by outcome",
            "Learner rounds that ended within the window: released, refused (the gate said no), failed (an error), "
            "passed_over (the release was changed by hand meanwhile).",
            "released, with a refusal now and then.",
            "only refused: the next panel says by which check. Any failed: the learner's log has the traceback.",
            "short",
            [Query(seen("heed_updates_total", "outcome"), "{{outcome}}")],
            bars=True,
        ),
        lines(
            "What the gate refused",
            "Checks that said no within the window, by name.",
            "none, or reward_model in the first updates: too little was said to know anything surely.",
            "kl: the policy is as far from the base as it may be. length, ended, repetition, variety: it learned to game the "
            "reward model. probes: it says what your probes forbid.",
            "short",
            [Query(seen('heed_gate_checks_total{verdict="fail"}', "check"), "{{check}}")],
            bars=True,
        ),
        lines(
            "Share of checks passed",
            "Of the gate's checks that were reached within the window, the share that passed.",
            "near 1.",
            "falling from update to update: people disagree, or the policy has gone as far as it may.",
            "percentunit",
            [
                Query(
                    share(
                        seen('heed_gate_checks_total{verdict="pass"}'),
                        seen('heed_gate_checks_total{verdict=~"pass|fail"}'),
                    ),
                    "passed",
                )
            ],
            top=1,
        ),
        number(
            "Since the last update",
            "Seconds since the last update ended.",
            "as long as people need to give enough feedback.",
            "hours although judgements wait: see the dashboard Learning. Since 1970: none has ended yet.",
            "s",
            [Query("time() - heed_last_update_timestamp_seconds", "ago")],
            width=6,
        ),
        number(
            "Judgements",
            "New judgements that wait, and how many start an update.",
            "waiting grows, then falls to 0 as an update begins.",
            "waiting above due for long: updates are paused, or the learner is stuck.",
            "short",
            [Query("heed_judgements_waiting", "waiting"), Query("heed_judgements_due", "due")],
            width=6,
        ),
    ]


def swaps() -> list[Panel]:
    return [
        lines(
            "Swaps",
            "Swaps within the window, of all servers: each release, and each rollback, is one on every server.",
            "activated after each release, none failed.",
            "failed: that server goes on with the version before; its log says why.",
            "short",
            [Query(seen("heed_swaps_total", "outcome"), "{{outcome}}")],
            width=12,
            bars=True,
        ),
        lines(
            "Feedback to served",
            "From a judgement's acceptance until a version that learned from it spoke (freshness), over the window.",
            "minutes.",
            "hours: updates wait for feedback, take long, or are refused.",
            "s",
            quantiles("heed_freshness_seconds", "$window"),
            width=12,
        ),
    ]
