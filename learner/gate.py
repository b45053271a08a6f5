"""May anyone see this candidate? A few checks, each with its number, its bound and a sentence that a person can read.

Letters are those of the recipe: (a) the reward model knows something, (c) the KL budget, (d) the outer form of the replies,
(e) the operator's probes (probes.py); and the update moved something, and not to something worse. What was not reached is
skipped, which passes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from learner.reward import RewardReport
from learner.rollouts import Rollout, Shape

Verdict = Literal["pass", "fail", "skipped"]

SURE = 2.326
"""Standard errors below the measured AUROC: one-sided 99%: of 40 fits to random thumbs two got through, at 95% four."""
KL_MARGIN = 1.1
"""How far above the limit of an update the candidate's KL may be measured: chance, on other samples."""
WORSE = 1.96
"""Standard errors below 0 from which on a candidate is surely worth less than the version it would replace."""
LENGTHS = (0.05, 0.95)
"""Percentiles of the base's reply lengths that the candidate's mean must lie between."""
ENDED_FALL = 0.03
REPETITION_RISE = 0.1
NLL_SHARE = 0.4
"""Of the base's −log p a token: a policy below has collapsed to a few phrases."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and its answer."""

    name: str
    verdict: Verdict
    value: float | None
    bound: float | None
    """The value must not be beyond it; which side, the sentence says."""
    sentence: str


@dataclass(frozen=True, slots=True)
class GateReport:
    """All the answers. The candidate ships when every check passed."""

    passed: bool
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, checks: Sequence[Check]) -> GateReport:
        return cls(all(check.verdict == "pass" for check in checks), tuple(checks))


def knows(report: RewardReport) -> Check:
    """(a) On judgements it never saw, the reward model does better than chance, surely."""
    if report.auroc is None:
        total = sum(report.judgements.values())
        return _check(
            "reward_model",
            False,
            None,
            0.5,
            f"There is nothing to learn from: {total} judgements, all saying the same, or all of one prompt.",
        )
    lower = report.lower(SURE)
    return _check(
        "reward_model",
        lower > 0.5,
        lower,
        0.5,
        f"The reward model orders {report.auroc:.0%} of unseen judgements rightly (at least {lower:.0%}, with 99% confidence); "
        f"chance is 50%{'' if lower > 0.5 else ', which it does not surely beat'}.",
    )


def no_feedback() -> Check:
    """Nothing was said, or of nothing that can be asked again."""
    return _check("reward_model", False, None, 0.5, "There is no feedback to learn from.")


def no_room(prompts: int, room: int, tokens: int) -> Check:
    """People were served longer prompts than the learner can make rollouts to."""
    return _check(
        "reward_model",
        False,
        None,
        0.5,
        f"None of {prompts} prompts leaves room for a reply of {tokens} tokens within the {room} of a rollout; set "
        "HEED_MAX_MODEL_LEN higher, or HEED_ROLLOUT_TOKENS lower.",
    )


def within_budget(kl: float, limit: float) -> Check:
    """(c) The candidate stays near the reference."""
    bound = KL_MARGIN * limit
    relation = "within" if kl <= bound else "above"
    return _check(
        "kl",
        kl <= bound,
        kl,
        bound,
        f"The candidate is {kl:.2f} nats a reply from the base, {relation} the bound of {bound:.2f}.",
    )


def changed(difference: float) -> Check:
    """The candidate is another adapter than the one that its training started from."""
    said = "moved" if difference > 0 else "did not move"
    return _check("changed", difference > 0, difference, 0.0, f"Training {said} the weights.")


def no_worse(gain: float, error: float) -> Check:
    """The candidate's replies are not surely worth less than those of the version it would replace, to the same prompts.

    By the reward model that PPO climbed: so a "no" is evidence, and a "yes" says only that nothing was lost by its own lights.
    `gain`: mean difference of what replies are worth, in standard deviations of the base's score; `error`: its standard error.
    """
    bound = -WORSE * error
    said = "not surely less" if gain >= bound else "surely less"
    return _check(
        "no_worse",
        gain >= bound,
        gain,
        bound,
        f"Replies are worth {gain:+.2f} beside those of the version it would replace, {said} (bound {bound:+.2f}).",
    )


def keeps_form(candidate: Sequence[Rollout], base: Sequence[Rollout]) -> list[Check]:
    """(d) Length, ending, repetition and variety of the candidate's replies beside the base's to the same prompts."""
    new, old = Shape.of(candidate), Shape.of(base)
    lengths = sorted(len(rollout.reply_ids) for rollout in base)
    low, high = (lengths[min(int(share * len(lengths)), len(lengths) - 1)] for share in LENGTHS)
    ended, repeated, nll = old.ended - ENDED_FALL, old.repetition + REPETITION_RISE, NLL_SHARE * old.nll
    return [
        _check(
            "length",
            low <= new.tokens <= high,
            new.tokens,
            float(low if new.tokens < low else high),
            f"Replies have {new.tokens:.1f} tokens in the mean; the middle 90% of the base's have {low} to {high}.",
        ),
        _check(
            "ended",
            new.ended >= ended,
            new.ended,
            ended,
            f"{new.ended:.1%} of replies end by themselves; at least {ended:.1%} must.",
        ),
        _check(
            "repetition",
            new.repetition <= repeated,
            new.repetition,
            repeated,
            f"{new.repetition:.1%} of four-token phrases repeat one of the same reply; at most {repeated:.1%} may.",
        ),
        _check(
            "variety",
            new.nll >= nll,
            new.nll,
            nll,
            f"A token takes {new.nll:.2f} nats to guess; at least {nll:.2f} are asked.",
        ),
    ]


def skipped(names: Sequence[str]) -> list[Check]:
    """Checks that were not reached."""
    return [Check(name, "skipped", None, None, "Not reached.") for name in names]


def _check(name: str, good: bool, value: float | None, bound: float, sentence: str) -> Check:
    return Check(name, "pass" if good else "fail", value, bound, sentence)
