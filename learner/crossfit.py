"""What judgements say of the replies they are about, by cross-fitting: fits to all folds but one, each tried on that one.

Axes: N judged replies, F features, S numbers of a state, J judgements, K members (one a fold).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.evidence import Evidence, kind_of
from learner.features import Features, Tables
from learner.judgement import key_of
from learner.losses import Links, rater_numbers
from learner.prepare import replies

if TYPE_CHECKING:
    from learner.judgement import Judgement, Tokens

    States = Callable[[Sequence[Tokens]], Tensor]
    """What the base makes of replies to their prompts, [B, S]."""

FEWEST_RATERS = 5
"""With fewer known raters than this the folds are dealt by prompt."""
EARLY_SHARE = 0.8
"""Of the judgements, in the order of time, that a fit is made to which is tried on the rest."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Settings of the reward model."""

    folds: int = 5
    """Members of the ensemble."""
    penalties: tuple[float, ...] = (0.5, 1.5, 4.0)
    """Ridge penalties to choose from by the likelihood of unseen judgements, in nats at a weight of length 1."""
    rounds: int = 2
    """How often the penalty is moved from features that matter to those that do not (adaptive ridge)."""
    weights: Mapping[str, float] = field(
        default_factory=lambda: {
            "preference": 1.0,
            "ranking": 1.0,
            "thumb": 0.5,
            "rating": 1.0,
            "correction": 0.5,
            "signal": 0.1,
        }
    )
    """How much a judgement of each kind counts."""
    smoothing: float = 0.05
    """Of preferences: the share of them taken to be slips."""
    rater_penalty: float = 1.0
    """Shrinks each rater's bias to 0, in nats at a bias of √2."""
    rater_share: float = 0.1
    """One rater's judgements are at most this share of all that count, where enough raters are known."""
    pessimism: float = 1.0
    """κ: how many standard deviations between members are taken off the score."""


def deal(judgements: Sequence[Judgement], folds: int, seed: int) -> tuple[list[int], str]:
    """A fold for each judgement, and by what they were dealt: raters, or prompts where fewer than five raters are known."""
    raters = {judgement.user for judgement in judgements if judgement.user}
    by = "rater" if len(raters) >= FEWEST_RATERS else "prompt"

    def group(judgement: Judgement) -> Hashable:
        return judgement.user if by == "rater" and judgement.user else judgement.reply.prompt_ids

    sizes = Counter(group(judgement) for judgement in judgements)
    order = sorted(sizes, key=repr)
    random.Random(seed).shuffle(order)
    filled = [0] * folds
    fold_of: dict[Hashable, int] = {}
    for one in sorted(order, key=lambda one: -sizes[one]):
        fold_of[one] = min(range(folds), key=filled.__getitem__)
        filled[fold_of[one]] += sizes[one]
    return [fold_of[group(judgement)] for judgement in judgements], by


@dataclass(slots=True)
class Member:
    """One fit: a weight for each feature, and the links from the utility to what people do."""

    weights_F: Tensor
    links: Links


def fit_member(features_NF: Tensor, evidence: Evidence, raters: int, penalty: float, config: RewardConfig) -> Member:
    """Maximum a posteriori weights. The prior is first the same for every feature, then moved to those that proved to matter.

    With prior variances D, w = D·Xᵀβ for some β (representer theorem), so the search is over as many numbers as there are
    judged replies, however many features there are.
    """
    rows = evidence.replies()
    seen_NF = features_NF[rows]
    prior_F = torch.ones(features_NF.shape[1], dtype=features_NF.dtype)
    size = seen_NF.square().sum()
    for last in [False] * config.rounds + [True]:
        links = Links(raters, config.smoothing, evidence.channels).to(features_NF.dtype)
        gram_NN = (seen_NF * prior_F) @ seen_NF.T
        root_NN = torch.linalg.cholesky(gram_NN + (1e-4 + 1e-6 * len(rows)) * torch.eye(len(rows), dtype=gram_NN.dtype))
        point_N = torch.zeros(len(rows), dtype=gram_NN.dtype, requires_grad=True)
        _minimise(point_N, links, root_NN, rows, len(features_NF), evidence, penalty, config)
        beta_N = torch.linalg.solve_triangular(root_NN.T, point_N.detach()[:, None], upper=True).squeeze(1)
        weights_F = prior_F * (seen_NF.T @ beta_N)
        if not last:
            prior_F = weights_F.abs().clamp_min(1e-3 * float(weights_F.abs().max()) + 1e-12)
            prior_F = prior_F * (size / (seen_NF.square() @ prior_F).sum().clamp_min(1e-12))
    return Member(weights_F, links.requires_grad_(False))


def _minimise(
    point_N: Tensor,
    links: Links,
    root_NN: Tensor,
    rows: Tensor,
    replies: int,
    evidence: Evidence,
    penalty: float,
    config: RewardConfig,
) -> None:
    """Find the utilities (root·point) and the links that make the judgements likeliest; both change in place."""
    # one slope stays, since the scale of the weights does for it: were it free, it would grow, and nothing be left of the penalty
    fixed = evidence.heaviest()
    slopes = [raw for channel, raw in links.raw_slopes.items() if channel != fixed]
    # what few may use stays near where it began
    shrunk = [*slopes, *(offset for channel, offset in links.offsets.items() if channel != kind_of(channel))]
    start = [one.detach().clone() for one in shrunk]
    free = [point_N, *links.offsets.values(), links.raw_gaps, links.bias, *slopes]
    search = torch.optim.LBFGS(
        free, max_iter=80, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        search.zero_grad()
        utility_N = root_NN.new_zeros(replies).index_put((rows,), root_NN @ point_N)
        loss = (evidence.losses(utility_N, links) * evidence.weight_J).sum()
        loss = loss + penalty / 2 * point_N.square().sum() + config.rater_penalty / 2 * links.bias.square().sum()
        loss = loss + sum(((one - at).square().sum() for one, at in zip(shrunk, start, strict=True)), start=loss * 0)
        loss.backward()
        return loss

    search.step(objective)


@dataclass(frozen=True, slots=True)
class Tried:
    """A member, and judgements that it never saw."""

    index_J: list[int]
    """Which of all judgements these are."""
    evidence: Evidence
    links: Links
    utility_N: Tensor
    """Of all judged replies, by this member."""

    def losses(self) -> Tensor:
        """Nats that each of these judgements costs the member, who knows no rater, [J]."""
        return self.evidence.losses(self.utility_N, self.links, known_raters=False)


class CrossFit:
    """The members, each fitted to all folds but one, and what each says of the fold it never saw."""

    def __init__(
        self,
        embeddings_VH: Tensor,
        eos_ids: Collection[int],
        judgements: Sequence[Judgement],
        states: States,
        config: RewardConfig,
        seed: int,
        progress: Callable[[float], None],
    ) -> None:
        self.judgements, self.config = judgements, config
        self.fold_J, self.by = deal(judgements, config.folds, seed)
        said = [sample for judgement in judgements for sample in replies(judgement)]
        samples = [*{key_of(sample): sample for sample in said}.values()]
        rows = {key_of(sample): row for row, sample in enumerate(samples)}
        self.raters = rater_numbers([judgement.user for judgement in judgements])
        self.evidence = Evidence.of(judgements, rows, self.raters, config)
        said_N, states_NS = [sample.reply_ids for sample in samples], states(samples)
        self.rated = samples, states_NS
        self.features = Features(embeddings_VH, eos_ids, said_N, states_NS)
        self.features_NF = self.features.of(said_N, states_NS)
        best = math.inf
        for number, penalty in enumerate(config.penalties):
            members = []
            for fold in range(config.folds):
                progress((number + fold / config.folds) / len(config.penalties))
                members.append(self._fit([row for row, of in enumerate(self.fold_J) if of != fold], penalty))
            tried = [self._try(member, self._fold(fold)) for fold, member in enumerate(members) if self._fold(fold)]
            weights = [one.evidence.weight_J for one in tried]
            cost = sum(float((one.losses() * weight_J).sum()) for one, weight_J in zip(tried, weights, strict=True))
            nll = cost / sum(float(weight_J.sum()) for weight_J in weights)
            if nll < best:
                best, self.members, self.penalty, self.tried = nll, members, penalty, tried

    def tables(self) -> Tables:
        """The members' utilities."""
        return self.features.tables(torch.stack([member.weights_F for member in self.members]))

    def unseen(self) -> list[Tried]:
        """Each member with the fold that it never saw; none where one fold holds everything."""
        return self.tried if len(set(self.fold_J)) > 1 else []

    def later(self) -> list[Tried]:
        """A fit to the first judgements with the last ones, which it never saw; none where there are too few."""
        order = sorted(range(len(self.judgements)), key=lambda row: (self.judgements[row].at, row))
        cut = int(EARLY_SHARE * len(order))
        early, late = order[:cut], order[cut:]
        return [self._try(self._fit(early, self.penalty), late)] if early else []

    def _fold(self, fold: int) -> list[int]:
        return [row for row, of in enumerate(self.fold_J) if of == fold]

    def _fit(self, rows: Sequence[int], penalty: float) -> Member:
        """A fit to these judgements; to all, where there are none."""
        evidence = self.evidence.at(torch.tensor(rows)) if rows else self.evidence
        return fit_member(self.features_NF, evidence, len(self.raters), penalty, self.config)

    def _try(self, member: Member, rows: list[int]) -> Tried:
        evidence = self.evidence.at(torch.tensor(rows))
        return Tried(rows, evidence, member.links, self.features_NF @ member.weights_F)
