"""The reward model: one utility of a reply, learned from everything people say, and honest about how much it knows.

Fitted anew at each update, by cross-fitting (learner/crossfit.py). What a member says of the judgements it never saw is the
evidence of the gate; what the members say together, less a price for their disagreement, is the score that PPO climbs.

Axes: B replies, K members, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.concordance import concordance
from learner.crossfit import CrossFit, Member, RewardConfig
from learner.evaluation import Bin, Figures, by_channel, calibration, compared, rater_agreement, surprises
from learner.evidence import chance_nll, top_share
from learner.features import Tables
from learner.judgement import Key
from learner.prepare import NOBODYS

if TYPE_CHECKING:
    from learner.crossfit import States
    from learner.judgement import Judgement, Sample, Tokens


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What the reward model learned, and how well it foretells judgements that it never saw."""

    judgements: dict[str, int]
    raters: int
    folds_by: str
    auroc: float | None
    """Of cross-fitted predictions of what was said of replies overall; pairs of stars, preferences and pairs of a ranking count
    as comparisons too. None: nothing to compare."""
    auroc_error: float
    comparisons: int
    nll: float
    """Of unseen judgements, nats each."""
    chance_nll: float
    """The same by a model that knows the shares alone."""
    calibration_error: float
    """Of unseen thumbs: mean distance of predicted and seen share of thumbs up over ten bins."""
    length_correlation: float
    """Of the score with the length of the reply, over the reference's replies."""
    penalty: float
    agreement: float
    """Mean correlation of two members over the reference's replies."""
    calibration: list[Bin] = field(default_factory=list)
    """Of unseen thumbs, in up to ten bins: the chance of a thumb up foretold, the share seen, and how many."""
    rater_agreement: float | None = None
    """Of two people who judged the same: how often they say the same. None: nobody judged what another did."""
    top_rater_share: float = 0.0
    """Of the weight of all judgements, what those of the heaviest rater weigh; 0: nobody gave a name."""
    unseen: Mapping[str, Figures] = field(default_factory=dict)
    """By kind, with aspect or signal: of cross-fitted predictions, by members that knew neither judgement nor rater."""
    later: Mapping[str, Figures] = field(default_factory=dict)
    """The same of the last fifth of the judgements by a fit to those before."""

    def lower(self, z: float) -> float:
        """A bound below the true AUROC."""
        return 0.0 if self.auroc is None else self.auroc - z * self.auroc_error

    def to_json(self) -> dict[str, Any]:
        """By field, as the update's report has it."""
        return {name: getattr(self, name) for name in self.__slots__}


class RewardModel:
    """The ensemble after a fit. Its score has mean 0 and standard deviation 1 over the reference policy's own replies."""

    def __init__(
        self,
        embeddings_VH: Tensor,
        eos_ids: Collection[int],
        config: RewardConfig,
        states: States = lambda samples: torch.zeros(len(samples), 0),
    ) -> None:
        """`embeddings_VH`: the base's input embeddings; `states`: what it makes of replies to their prompts."""
        self.embeddings_VH, self.eos_ids, self.config, self.states = embeddings_VH, eos_ids, config, states
        self.tables: Tables | None = None
        self.rated: tuple[Sequence[Sample], Tensor] = ((), torch.zeros(0, 0))
        """The judged replies of the last fit, and what the base makes of them, [N, S]."""
        self.surprises: Mapping[Key, float] = {}
        """Of each reply with thumbs, by how much they were better than was foretold (learner/evaluation.py)."""
        self.slope, self.offset = 1.0, 0.0
        self.shift, self.scale = 0.0, 1.0

    def fit(
        self,
        judgements: Sequence[Judgement],
        reference: Sequence[Tokens],
        seed: int,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> RewardReport:
        """Learn from all judgements anew. `reference`: replies of the reference policy, which fix the scale of the score."""
        fit = CrossFit(self.embeddings_VH, self.eos_ids, judgements, self.states, self.config, seed, progress)
        self.tables, self.rated, self.surprises = fit.tables(), fit.rated, surprises(fit.unseen(), fit.judgements)
        utility_KB = self._normalise(self._utilities(reference), fit.members)
        return self._report(fit, utility_KB, [len(sample.reply_ids) for sample in reference])

    def _utilities(self, samples: Sequence[Tokens]) -> Tensor:
        """What each member says of these replies, [K, B]."""
        assert self.tables is not None, "fit the reward model first"
        return self.tables.utilities([sample.reply_ids for sample in samples], self.states(samples))

    def _normalise(self, utility_KB: Tensor, members: Sequence[Member]) -> Tensor:
        """Mean 0 and standard deviation 1 over these replies, for each member and for the score of all.

        The links follow, on average over the members. Returns the utilities on their new scale, [K, B].
        """
        assert self.tables is not None
        shift_K, scale_K = utility_KB.mean(1), utility_KB.std(1).clamp_min(1e-6)
        self.tables = self.tables.rescaled(shift_K, scale_K)
        slope_K = torch.stack([member.links.slope("thumb") for member in members])
        offset_K = torch.stack([member.links.offsets["thumb"] for member in members])
        self.slope, self.offset = float((slope_K * scale_K).mean()), float((offset_K + slope_K * shift_K).mean())
        self.shift, self.scale = 0.0, 1.0
        utility_KB = (utility_KB - shift_K[:, None]) / scale_K[:, None]
        score_B = self._combine(utility_KB)
        self.shift, self.scale = float(score_B.mean()), max(float(score_B.std()), 1e-6)
        return utility_KB

    def _combine(self, utility_K: Tensor) -> Tensor:
        """Log of the chance of a thumb up, by the members' mean less κ standard deviations, on the score's scale.

        Members stand first. The logarithm of a chance saturates: a reply that is surely liked gains nothing by more of the
        same, so one manner cannot make up for another, and less is to be had by fooling the model (2402.00742, section 2).
        """
        careful = utility_K.mean(0) - self.config.pessimism * utility_K.std(0)
        score = logsigmoid(self.slope * careful + self.offset)
        return (score - self.shift) / self.scale

    def score(self, samples: Sequence[Tokens]) -> Tensor:
        """The score of each reply, [B]."""
        return self._combine(self._utilities(samples))

    def running(self, samples: Sequence[Tokens], states_BS: Tensor) -> list[Tensor]:
        """For each reply the score of what was said so far, before its first token and after each, [T+1]."""
        assert self.tables is not None, "fit the reward model first"
        pairs = zip(samples, states_BS, strict=True)
        return [self._combine(self.tables.running(sample.reply_ids, state_S)) for sample, state_S in pairs]

    def _report(self, fit: CrossFit, utility_KB: Tensor, lengths: Sequence[int]) -> RewardReport:
        """How good the members are, and what they say of the reference's replies, of these lengths."""
        by_prompt = [judgement.reply.prompt_ids for judgement in fit.judgements]
        by_rater = [judgement.user or row for row, judgement in enumerate(fit.judgements)]
        found = concordance(compared(fit.unseen()), [by_prompt, by_rater])
        unseen_loss_J = torch.cat([tried.losses() for tried in fit.tried])
        unseen = by_channel(fit.unseen())
        return RewardReport(
            judgements=dict(
                Counter(judgement.kind for judgement in fit.judgements if judgement.feedback_id != NOBODYS)
            ),
            raters=len(fit.raters),
            folds_by=fit.by,
            auroc=None if found is None else found.share,
            auroc_error=0.0 if found is None else found.error,
            comparisons=0 if found is None else found.comparisons,
            nll=float(unseen_loss_J.mean()),
            chance_nll=chance_nll(fit.judgements),
            calibration_error=(unseen.get("thumb") or {}).get("ece") or 0.0,
            length_correlation=correlation(self._combine(utility_KB), torch.tensor(lengths).float()),
            penalty=fit.penalty,
            agreement=_agreement(utility_KB),
            rater_agreement=rater_agreement(fit.judgements),
            top_rater_share=top_share([judgement.user for judgement in fit.judgements], fit.evidence.weight_J.tolist()),
            unseen=unseen,
            later=by_channel(fit.later()),
            calibration=calibration(fit.unseen(), "thumb"),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The fitted tables and the scale of the score; of the links, what turns the score into a chance."""
        if self.tables is None:
            return {}, {}
        names = [name for name in Tables.__slots__ if name != "eos_ids"]
        return {name: getattr(self.tables, name) for name in names}, {
            "slope": self.slope,
            "offset": self.offset,
            "shift": self.shift,
            "scale": self.scale,
        }

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        if tensors:
            self.tables = Tables(**tensors, eos_ids=frozenset(self.eos_ids))
            self.slope, self.offset = float(meta["slope"]), float(meta["offset"])
            self.shift, self.scale = float(meta["shift"]), float(meta["scale"])


def correlation(a_B: Tensor, b_B: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a_B, b_B = a_B - a_B.mean(), b_B - b_B.mean()
    return float((a_B * b_B).sum() / (a_B.norm() * b_B.norm()).clamp_min(1e-9))


def _agreement(utility_KB: Tensor) -> float:
    pairs = [
        correlation(utility_KB[one], utility_KB[other])
        for one in range(len(utility_KB))
        for other in range(one + 1, len(utility_KB))
    ]
    return sum(pairs) / max(len(pairs), 1)
