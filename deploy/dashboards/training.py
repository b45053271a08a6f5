"""The dashboard "Learning", its second half: what an update measured of the reward model and of the policy, and its pace."""

from __future__ import annotations

from deploy.dashboards.panels import Panel, Query, lines, quantile, quantiles


def reward_model() -> list[Panel]:
    return [
        lines(
            "Unseen judgements ordered rightly",
            "How often the reward model orders two judgements that it did not train on as people did (AUROC), with two "
            "standard errors to either side.",
            "0.7 and more; noise in what people say bounds it.",
            "0.5 is chance: the gate then refuses. A fall while the score rises is over-optimisation: pause, and read replies.",
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
            "Mean distance between the foretold and the seen share of thumbs up.",
            "below 0.05.",
            "above 0.15: the scores order replies, but their size means little.",
            "percentunit",
            [Query("heed_reward_calibration_error", "error")],
        ),
        lines(
            "Cost of an unseen judgement",
            "Nats that an unseen judgement costs the reward model, and who knows the shares alone.",
            "the model's line is below the other.",
            "above it: the reward model knows less than nothing.",
            "none",
            [
                Query("heed_reward_nll_nats", "reward model"),
                Query("heed_reward_chance_nll_nats", "shares alone"),
            ],
        ),
        lines(
            "Score",
            "Mean score, by the reward model, of the candidate's fresh replies and of the base's to the same prompts.",
            "the candidate's is above the base's, and people's opinion (above) rises with it.",
            "it rises while people's opinion falls: the policy games the reward model.",
            "none",
            [
                Query("heed_reward_score_candidate", "candidate"),
                Query("heed_reward_score_base", "base"),
            ],
            width=12,
        ),
        lines(
            "Signs of gaming",
            "Correlation of the score with the reply's length, and of two members of the ensemble with each other.",
            "length near 0, agreement above 0.8.",
            "length above 0.5: it likes long replies, whatever they say. Agreement below 0.5: what it has learned is chance.",
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
            "KL of the candidate to the base, nats a reply; the limit that an update may end at.",
            "rises with the first updates, then stays below the limit.",
            "at the limit: the gate refuses from a tenth above it. Only a larger HEED_KL_LIMIT lets it learn more, at more risk.",
            "none",
            [
                Query("heed_kl_reference_nats", "KL"),
                Query("heed_kl_limit_nats", "limit"),
            ],
        ),
        lines(
            "Price of a nat",
            "The KL coefficient in the last batch of PPO: what a nat of distance costs in score.",
            "settles within some updates.",
            "grows from update to update: the policy pushes against its bound.",
            "none",
            [Query("heed_kl_coefficient", "coefficient")],
        ),
        lines(
            "Clip fraction",
            "Share of tokens in the last PPO batch whose probability ratio was clipped.",
            "between 0.01 and 0.2.",
            "above 0.3: steps are too large (HEED_LEARNING_RATE). 0: they move nothing.",
            "percentunit",
            [Query("heed_ppo_clip_fraction", "clipped")],
        ),
        lines(
            "Explained variance",
            "Share of the returns' variance that the value function foretells, in the last PPO batch.",
            "above 0, rising from batch to batch.",
            "below 0: worse than a constant; advantages are noise.",
            "percentunit",
            [Query("heed_ppo_explained_variance", "explained")],
        ),
        lines(
            "Step size and entropy",
            "KL of the policy that made the last PPO batch's replies to the new one, and its entropy, both nats a token.",
            "a small step; an entropy that falls slowly.",
            "entropy near 0: it says the same to everyone. Steps above 0.1: too large to trust the clipped objective.",
            "none",
            [
                Query("heed_ppo_approximate_kl_nats", "step"),
                Query("heed_ppo_entropy_nats", "entropy"),
            ],
        ),
        lines(
            "Replies in training",
            "Mean tokens of the last PPO batch's replies.",
            "about what the base says.",
            "it runs away in either direction, without people having asked for that.",
            "short",
            [Query("heed_ppo_tokens", "tokens")],
        ),
        lines(
            "Replies that end by themselves",
            "Share of the last PPO batch's replies that ended before they were cut off.",
            "near 1.",
            "falling: the policy learned to go on and on. From the start: HEED_ROLLOUT_TOKENS is too small.",
            "percentunit",
            [Query("heed_ppo_ended_ratio", "ended")],
            top=1,
        ),
        lines(
            "Served replies as experience",
            "Share of the last update's experience that people were served (HEED_LIVE_SHARE), 0 where none was.",
            "what you set.",
            "far less: too few replies were rated by versions young enough.",
            "percentunit",
            [Query("heed_live_replies_ratio", "served")],
        ),
        lines(
            "Staleness",
            "Mean age of those replies, in versions; 0 where there were none.",
            "below 2.",
            "4 is the most that is taken: such replies tell little of the policy as it is.",
            "short",
            [Query("heed_live_staleness_versions", "versions")],
        ),
    ]


def pace() -> list[Panel]:
    return [
        lines(
            "Freshness",
            "From a judgement's acceptance until a version that learned from it spoke, over the window.",
            "minutes: people see that it helped.",
            "hours: too little feedback, slow updates, or refusals.",
            "s",
            quantiles("heed_freshness_seconds", "$window"),
        ),
        lines(
            "Events not yet absorbed",
            "Events in the log that the learner has not read, by topic.",
            "0, or a short rise in busy minutes.",
            "a line that only rises: the learner is too slow, or stopped.",
            "short",
            [Query("sum by (topic) (heed_learner_offset_lag)", "{{topic}}")],
        ),
        lines(
            "Update time by phase",
            "Within this long 95% of the window's updates passed each phase.",
            "the same from update to update.",
            "the reward model's phase grows with the feedback that is kept (HEED_STATE_KEEP_DAYS); ppo and rollouts with the "
            "settings of their names.",
            "s",
            [Query(quantile(0.95, "heed_update_seconds", "phase", "$window"), "{{phase}}")],
        ),
    ]
