"""The dashboard "Learning": is it getting better, from what does it learn, and can what it learned be trusted?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.opinions import BANDS, COLUMNS, liked, stars
from deploy.dashboards.panels import (
    Meaning, Panel, Query, banded, board, lines, quantile, quantiles, rate, rows, seen, share,
)  # fmt: skip

FATES = "heed_feedback_fates"
LOST = 'heed_feedback_dropped_total{reason="no_exchange"}'


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
    bounds = "A version's replies are judged for as long as people rate them, and count for what the version is then."
    return [
        rows(
            "The current version beside the one before and the base",
            Meaning(
                "Of thumbs and ratings within the window: the share liked (thumb up, 4 or 5 stars) and the mean stars, each with the "
                f"bounds of its 95% confidence interval and how many were counted. {bounds}",
                "the current version's `at least` is above the `at most` of the others: it is surely better.",
                "its `at most` is below their `at least`: roll it back (`heed adapters rollback`). Where intervals overlap, nobody "
                "knows yet; wait, or take a longer window.",
            ),
            COLUMNS,
            by="role",
            units={
                **dict.fromkeys(("liked", "liked, at least", "liked, at most"), "percentunit"),
                **dict.fromkeys(("judged", "rated"), "short"),
            },
        ),
        banded(
            "Share liked",
            Meaning(
                "Of thumbs and ratings within the window, the share that is a thumb up, four stars or five (95% interval by Wilson); "
                "marks show which version spoke when. After a swap the window still holds what was said of the version before it.",
                "blue (current) is above orange (the one before) and grey (the base), and the bands come apart.",
                "blue below the others with no overlap.",
            ),
            "percentunit",
            {name: liked(side) for side, name in BANDS.items()},
            bottom=0,
            top=1,
        ),
        banded(
            "Mean stars",
            Meaning(
                "Mean of the ratings within the window, 1 to 5 (95% interval by the normal distribution: with fewer than thirty "
                "ratings it is too narrow).",
                "as for the share liked.",
                "stars fall while the share liked rises: thumbs and ratings come from different people, or of different replies.",
            ),
            "none",
            {name: stars(side) for side, name in BANDS.items()},
            bottom=1,
            top=5,
        ),
    ]


def feedback() -> list[Panel]:
    joined = f'sum(delta({FATES}{{fate=~"joined|superseded"}}[$window]))'
    arrived = f'sum(delta({FATES}{{fate=~"joined|superseded|pending"}}[$window]))'
    return [
        lines(
            "Feedback by kind",
            Meaning(
                "Feedback accepted within the window, by kind.",
                "several kinds, from many people.",
                "none: nobody sees the buttons, or your application does not send what they press.",
            ),
            "short",
            [Query(seen('heed_feedback_total{outcome="accepted",kind!="unknown"}', "kind"), "{{kind}}")],
            bars=True,
        ),
        lines(
            "Join rate",
            Meaning(
                "Of the feedback that reached the learner within the window, the share that met its exchange.",
                "1, or near it.",
                "below 0.9: exchanges are not kept (`store: false`, a full outbox), or they come late.",
            ),
            "percentunit",
            [Query(share(joined, arrived), "joined")],
            top=1,
        ),
        lines(
            "Dropped",
            Meaning(
                "Feedback and events within the window that do not count, by reason.",
                "none.",
                "no_exchange: its exchange never came (HEED_JOIN_WAIT_S). conflict: the same id with another body. malformed, "
                "newer_schema: something else writes to the log, or a newer Heed does.",
            ),
            "short",
            [Query(seen("heed_feedback_dropped_total", "reason"), "{{reason}}")],
            bars=True,
        ),
        lines(
            "Not accepted",
            Meaning(
                "Feedback within the window that the server answered otherwise than with a receipt of its own, by outcome.",
                "repeated and retracted: clients ask again, people change their minds.",
                "unknown_reply, not_stored, malformed, conflict: a client sends what it should not. unavailable: the log is away and "
                "the outbox full.",
            ),
            "short",
            [Query(seen('heed_feedback_total{outcome!="accepted"}', "outcome"), "{{outcome}}")],
            bars=True,
        ),
        lines(
            "Judgements waiting",
            Meaning(
                "New judgements (joined thumbs, ratings, preferences), and how many of them start an update now.",
                "a saw: waiting rises to due, an update begins, waiting falls.",
                "waiting stays above due: paused, or stuck; GET /v1/policy says `why`.",
            ),
            "short",
            [Query("heed_judgements_waiting", "waiting"), Query("heed_judgements_due", "due")],
        ),
        lines(
            "Heaviest rater",
            Meaning(
                "Share of the reward model's training weight that one rater has. A rater is held to a tenth of it where there are "
                "twenty or more, and to what two equal raters would have where there are few.",
                "below 0.2.",
                "above 0.3 with many users: one person, or one script, teaches everybody's model.",
            ),
            "percentunit",
            [Query("heed_rater_weight_top_share", "heaviest")],
            top=1,
        ),
    ]


def reward_model() -> list[Panel]:
    return [
        lines(
            "Unseen judgements ordered rightly",
            Meaning(
                "How often the reward model orders two judgements that it did not train on as people did (AUROC), with two standard "
                "errors to either side.",
                "0.7 and more; noise in what people say bounds it.",
                "0.5 is chance: the gate then refuses. A fall while the score rises is over-optimisation: stop and look at replies.",
            ),
            "percentunit",
            [
                Query("heed_reward_auroc", "rightly"),
                Query("heed_reward_auroc - 2 * heed_reward_auroc_error", "at least"),
                Query("heed_reward_auroc + 2 * heed_reward_auroc_error", "at most"),
            ],
            top=1,
        ),
        lines(
            "Calibration error",
            Meaning(
                "Mean distance between the foretold and the seen share of thumbs up.",
                "below 0.1.",
                "above 0.2: the scores order replies, but their size means little.",
            ),
            "percentunit",
            [Query("heed_reward_calibration_error", "error")],
        ),
        lines(
            "Cost of an unseen judgement",
            Meaning(
                "Nats that an unseen judgement costs the reward model, and who knows the shares alone.",
                "the model's line is below the other.",
                "above it: the reward model knows less than nothing.",
            ),
            "none",
            [
                Query("heed_reward_nll_nats", "reward model"),
                Query("heed_reward_chance_nll_nats", "shares alone"),
            ],
        ),
        lines(
            "Score",
            Meaning(
                "Mean score, by the reward model, of the candidate's fresh replies and of the base's to the same prompts.",
                "the candidate's is above the base's, and people's opinion (above) rises with it.",
                "it rises while people's opinion falls: the policy games the reward model.",
            ),
            "none",
            [
                Query("heed_reward_score_candidate", "candidate"),
                Query("heed_reward_score_base", "base"),
            ],
            width=12,
        ),
        lines(
            "Signs of gaming",
            Meaning(
                "Correlation of the score with the reply's length, and of two members of the ensemble with each other.",
                "length near 0, agreement near 1.",
                "length above 0.5: it likes long replies, whatever they say. Agreement below 0.5: what it has learned is chance.",
            ),
            "none",
            [
                Query("heed_reward_length_correlation", "with length"),
                Query("heed_reward_agreement", "agreement"),
            ],
            width=12,
        ),
    ]


def policy() -> list[Panel]:
    return [
        lines(
            "Distance from the base",
            Meaning(
                "KL of the candidate to the base, nats a reply; the limit that an update may end at.",
                "rises with the first updates, then stays below the limit.",
                "at the limit: the gate refuses from a tenth above it. More can be learned only with a larger HEED_KL_LIMIT, at more risk.",
            ),
            "none",
            [
                Query("heed_kl_reference_nats", "KL"),
                Query("heed_kl_limit_nats", "limit"),
            ],
        ),
        lines(
            "Price of a nat",
            Meaning(
                "The KL coefficient in the last batch of PPO: what a nat of distance costs in score.",
                "settles within some updates.",
                "grows from update to update: the policy pushes against its bound.",
            ),
            "none",
            [Query("heed_kl_coefficient", "coefficient")],
        ),
        lines(
            "Clip fraction",
            Meaning(
                "Share of tokens in the last PPO batch whose probability ratio was clipped.",
                "between 0.01 and 0.2.",
                "above 0.3: steps are too large (HEED_LEARNING_RATE). 0: they move nothing.",
            ),
            "percentunit",
            [Query("heed_ppo_clip_fraction", "clipped")],
        ),
        lines(
            "Explained variance",
            Meaning(
                "Share of the returns' variance that the value function foretells, in the last PPO batch.",
                "above 0, rising from batch to batch.",
                "below 0: worse than a constant; advantages are noise.",
            ),
            "percentunit",
            [Query("heed_ppo_explained_variance", "explained")],
        ),
        lines(
            "Step size and entropy",
            Meaning(
                "KL of the last PPO batch's new policy to the one that made the replies, and the policy's entropy, both nats a token.",
                "a small step; an entropy that falls slowly.",
                "entropy near 0: it says the same to everyone. Steps above 0.1: too large to trust the clipped objective.",
            ),
            "none",
            [
                Query("heed_ppo_approximate_kl_nats", "step"),
                Query("heed_ppo_entropy_nats", "entropy"),
            ],
        ),
        lines(
            "Replies in training",
            Meaning(
                "Mean tokens of the last PPO batch's replies.",
                "about what the base says.",
                "it runs away in either direction, without people having asked for that.",
            ),
            "short",
            [Query("heed_ppo_tokens", "tokens")],
        ),
        lines(
            "Replies that end by themselves",
            Meaning(
                "Share of the last PPO batch's replies that ended before they were cut off.",
                "near 1.",
                "falling: the policy learned to go on and on. From the start: HEED_ROLLOUT_TOKENS is too small.",
            ),
            "percentunit",
            [Query("heed_ppo_ended_ratio", "ended")],
            top=1,
        ),
        lines(
            "Served replies as experience",
            Meaning(
                "Share of the last update's experience that people were served (HEED_LIVE_SHARE), 0 where none was.",
                "what you set.",
                "far less: too few replies were rated by versions young enough.",
            ),
            "percentunit",
            [Query("heed_live_replies_ratio", "served")],
        ),
        lines(
            "Staleness",
            Meaning(
                "Mean age of those replies, in versions; 0 where there were none.",
                "below 2.",
                "4 is the most that is taken: such replies tell little of the policy as it is.",
            ),
            "short",
            [Query("heed_live_staleness_versions", "versions")],
        ),
    ]


def pace() -> list[Panel]:
    return [
        lines(
            "Freshness",
            Meaning(
                "From a judgement's acceptance until a version that learned from it spoke, over the window.",
                "minutes: people see that it helped.",
                "hours: too little feedback, slow updates, or refusals.",
            ),
            "s",
            quantiles("heed_freshness_seconds", "$window"),
        ),
        lines(
            "Events not yet absorbed",
            Meaning(
                "Events in the log that the learner has not read, by topic.",
                "0, or a short rise in busy minutes.",
                "a line that only rises: the learner is too slow, or stopped.",
            ),
            "short",
            [Query("sum by (topic) (heed_learner_offset_lag)", "{{topic}}")],
        ),
        lines(
            "Update time by phase",
            Meaning(
                "Within this long 95% of the window's updates passed each phase.",
                "the same from update to update.",
                "the reward model's phase grows with the feedback that is kept (HEED_STATE_KEEP_DAYS); ppo and rollouts with the "
                "settings of their names.",
            ),
            "s",
            [Query(quantile(0.95, "heed_update_seconds", "phase", "$window"), "{{phase}}")],
        ),
    ]
