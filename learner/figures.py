"""The numbers in an update's report: as JSON takes them, and as Prometheus names them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "heed_reward_auroc": (
        "How often the reward model orders two unseen judgements rightly; 0.5 is chance.",
        ("reward", "auroc"),
    ),
    "heed_reward_auroc_error": ("Standard error of that.", ("reward", "auroc_error")),
    "heed_reward_nll_nats": ("Nats an unseen judgement costs the reward model.", ("reward", "nll")),
    "heed_reward_chance_nll_nats": ("Nats it costs who knows the shares alone.", ("reward", "chance_nll")),
    "heed_reward_calibration_error": (
        "Mean distance of foretold and seen share of thumbs up.",
        ("reward", "calibration_error"),
    ),
    "heed_reward_length_correlation": ("Of the score with the reply's length.", ("reward", "length_correlation")),
    "heed_reward_agreement": ("Mean correlation of two members of the ensemble.", ("reward", "agreement")),
    "heed_rater_weight_top_share": (
        "Share of the reward model's training weight that its heaviest rater has.",
        ("reward", "top_rater_share"),
    ),
    "heed_reward_score_candidate": ("Mean score of the candidate's fresh replies.", ("score", "candidate")),
    "heed_reward_score_base": ("Mean score of the base's replies to the same prompts.", ("score", "base")),
    "heed_kl_reference_nats": ("KL of the candidate to the base, nats a reply.", ("kl", "reference")),
    "heed_kl_coefficient": ("Price of a nat in the last PPO batch.", ("policy", "batches", "beta")),
    "heed_ppo_score": ("Mean score of the last PPO batch.", ("policy", "batches", "score")),
    "heed_ppo_tokens": ("Mean tokens a reply of the last PPO batch.", ("policy", "batches", "tokens")),
    "heed_ppo_explained_variance": (
        "Share of the returns' variance that the value foretells.",
        ("policy", "batches", "explained_variance"),
    ),
    "heed_ppo_ended_ratio": (
        "Share of the last PPO batch's replies that ended by themselves.",
        ("policy", "batches", "ended"),
    ),
    "heed_ppo_clip_fraction": (
        "Share of the tokens whose ratio was outside the clip, in the last PPO batch that was learned from.",
        ("policy", "batches", "clipped"),
    ),
    "heed_ppo_approximate_kl_nats": (
        "KL of the rollouts' policy to the new one at that batch's last step (k3), nats a token.",
        ("policy", "batches", "moved"),
    ),
    "heed_ppo_entropy_nats": (
        "Entropy of the policy, nats a token, by the fresh replies of the last PPO batch.",
        ("policy", "batches", "entropy"),
    ),
    "heed_live_staleness_versions": (
        "Mean age, in versions, of the served replies that were experience in the last update; 0 where none was.",
        ("live", "staleness"),
    ),
    "heed_live_replies_ratio": ("Their share of its replies.", ("live", "share")),
}
"""Gauges of the last update: name → what it says, and where it stands in the report; of batches, in the last that has it."""


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The gauges that a report has values for."""
    found = {name: _at(report, path) for name, (_, path) in FIGURES.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def jsonable(value: Any) -> Any:
    """The same with lists for tuples, and None for what JSON cannot say (NaN, infinity)."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _at(value: Any, path: Sequence[str]) -> Any:
    for step in path:
        if isinstance(value, list):
            value = next((one for one in reversed(value) if step in one), None)
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value
