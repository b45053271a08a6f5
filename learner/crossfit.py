"""What judgements say of the replies they are about, by cross-fitting: fits to all folds but one, each tried on that one.

Axes: N judged replies, F features, S numbers of a state, J judgements, K members (one a fold).
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.concordance import Compared
from learner.features import Features, Tables
from learner.losses import Links, rater_numbers

if TYPE_CHECKING:
    from learner.model import Tokens
    from learner.state import Judgement

    States = Callable[[Sequence[Tokens]], Tensor]
    """What the base makes of replies to their prompts, [B, S]."""

KINDS = ("thumb", "rating", "preference")
FEWEST_RATERS = 5
"""With fewer known raters than this the folds are dealt by prompt."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Settings of the reward model."""

    folds: int = 5
    """Members of the ensemble."""
    penalties: tuple[float, ...] = (0.5, 1.5, 4.0)
    """Ridge penalties to choose from by the likelihood of unseen judgements, in nats at a weight of length 1."""
    rounds: int = 2
    """How often the penalty is moved from features that matter to those that do not (adaptive ridge)."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"thumb": 0.5, "rating": 1.0, "preference": 1.0})
    """How much a judgement of each kind counts."""
    smoothing: float = 0.05
    """Of preferences: the share of them taken to be slips."""
    rater_penalty: float = 1.0
    """Shrinks each rater's bias to 0, in nats at a bias of √2."""
    rater_share: float = 0.1
    """One rater's judgements are at most this share of all that count, where enough raters are known."""
    pessimism: float = 1.0
    """κ: how many standard deviations between members are taken off the score."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Judgements as tensors: which replies (rows of a feature table) each is about, and what it says."""

    kind_J: Tensor
    """Index into KINDS."""
    reply_J: Tensor
    other_J: Tensor
    """The rejected reply of a preference; elsewhere the reply itself."""
    value_J: Tensor
    rater_J: Tensor
    weight_J: Tensor

    def __len__(self) -> int:
        return len(self.kind_J)

    def at(self, index: Tensor) -> Evidence:
        """Some of the judgements."""
        return Evidence(*(getattr(self, name)[index] for name in Evidence.__slots__))

    def losses(self, utility_N: Tensor, links: Links, *, known_raters: bool = True) -> Tensor:
        """The negative log-likelihood of each judgement, [J]; `known_raters` False leaves the raters' biases out."""
        rater_J = self.rater_J if known_raters else torch.zeros_like(self.rater_J)
        loss_J = utility_N.new_zeros(len(self))
        thumb_J, rating_J, preference_J = (self.kind_J == kind for kind in range(len(KINDS)))
        reply_J, other_J = utility_N[self.reply_J], utility_N[self.other_J]
        if thumb_J.any():
            loss_J = loss_J.masked_scatter(
                thumb_J, links.thumb(reply_J[thumb_J], self.value_J[thumb_J], rater_J[thumb_J])
            )
        if rating_J.any():
            loss_J = loss_J.masked_scatter(
                rating_J, links.rating(reply_J[rating_J], self.value_J[rating_J], rater_J[rating_J])
            )
        if preference_J.any():
            loss_J = loss_J.masked_scatter(preference_J, links.preference(reply_J[preference_J], other_J[preference_J]))
        return loss_J


def weigh(judgements: Sequence[Judgement], config: RewardConfig) -> list[float]:
    """The weight of each judgement: that of its kind, less where one rater would have more than their share."""
    counts = Counter(judgement.user for judgement in judgements if judgement.user)
    allowed = max(config.rater_share, 2 / len(counts)) * len(judgements) if counts else math.inf
    return [
        config.weights[judgement.kind]
        / config.weights["thumb"]
        * (min(1.0, allowed / counts[judgement.user]) if judgement.user else 1.0)
        for judgement in judgements
    ]


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
    rows = torch.unique(torch.cat([evidence.reply_J, evidence.other_J]))
    seen_NF = features_NF[rows]
    prior_F = torch.ones(features_NF.shape[1], dtype=features_NF.dtype)
    size = seen_NF.square().sum()
    for last in [False] * config.rounds + [True]:
        links = Links(raters, config.smoothing).to(features_NF.dtype)
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
    # the thumbs' slope stays: the scale of the weights does for it
    slopes = [raw for kind, raw in links.raw_slopes.items() if kind != "thumb"]
    start = [raw.detach().clone() for raw in slopes]
    free = [point_N, links.offset, links.first_threshold, links.raw_gaps, links.bias, *slopes]
    search = torch.optim.LBFGS(
        free, max_iter=80, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        search.zero_grad()
        utility_N = root_NN.new_zeros(replies).index_put((rows,), root_NN @ point_N)
        loss = (evidence.losses(utility_N, links) * evidence.weight_J).sum()
        loss = loss + penalty / 2 * point_N.square().sum() + config.rater_penalty / 2 * links.bias.square().sum()
        loss = loss + sum(((raw - at).square().sum() for raw, at in zip(slopes, start, strict=True)), start=loss * 0)
        loss.backward()
        return loss

    search.step(objective)


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
        said = [s for judgement in judgements for s in (judgement.reply, judgement.other) if s is not None]
        samples = [*{(sample.prompt_ids, sample.reply_ids): sample for sample in said}.values()]
        self.raters = rater_numbers([judgement.user for judgement in judgements])
        self.evidence = self._evidence(samples)
        replies, states_NS = [sample.reply_ids for sample in samples], states(samples)
        self.rated = samples, states_NS
        self.features = Features(embeddings_VH, eos_ids, replies, states_NS)
        self.features_NF = self.features.of(replies, states_NS)
        best = math.inf
        for number, penalty in enumerate(config.penalties):
            members = []
            for fold in range(config.folds):
                progress((number + fold / config.folds) / len(config.penalties))
                members.append(self._fit(fold, penalty))
            unseen_J = self._unseen(
                members, lambda member, utility, rows: rows.losses(utility, member.links, known_raters=False)
            )
            nll = float((unseen_J * self.evidence.weight_J).sum() / self.evidence.weight_J.sum())
            if nll < best:
                best, self.members, self.penalty, self.unseen_loss_J = nll, members, penalty, unseen_J

    def tables(self) -> Tables:
        """The members' utilities."""
        return self.features.tables(torch.stack([member.weights_F for member in self.members]))

    def _evidence(self, samples: Sequence[Tokens]) -> Evidence:
        rows = {(sample.prompt_ids, sample.reply_ids): row for row, sample in enumerate(samples)}

        def row_of(sample: Tokens) -> int:
            return rows[sample.prompt_ids, sample.reply_ids]

        return Evidence(
            kind_J=torch.tensor([KINDS.index(judgement.kind) for judgement in self.judgements]),
            reply_J=torch.tensor([row_of(judgement.reply) for judgement in self.judgements]),
            other_J=torch.tensor([row_of(judgement.other or judgement.reply) for judgement in self.judgements]),
            value_J=torch.tensor([float(judgement.value) for judgement in self.judgements]),
            rater_J=torch.tensor([self.raters.get(judgement.user or "", 0) for judgement in self.judgements]),
            weight_J=torch.tensor(weigh(self.judgements, self.config)),
        )

    def _rows(self, fold: int, *, inside: bool) -> Tensor:
        return torch.tensor([row for row, of in enumerate(self.fold_J) if (of == fold) == inside], dtype=torch.long)

    def _fit(self, fold: int, penalty: float) -> Member:
        """A fit to everything outside the fold; to everything, where nothing lies outside."""
        rows = self._rows(fold, inside=False)
        evidence = self.evidence.at(rows) if len(rows) else self.evidence
        return fit_member(self.features_NF, evidence, len(self.raters), penalty, self.config)

    def _unseen(self, members: Sequence[Member], what: Callable[[Member, Tensor, Evidence], Tensor]) -> Tensor:
        """Something of each judgement, [J], by the member that never saw it."""
        out_J = torch.zeros(len(self.judgements))
        for fold, member in enumerate(members):
            rows = self._rows(fold, inside=True)
            if len(rows):
                out_J[rows] = what(member, self.features_NF @ member.weights_F, self.evidence.at(rows)).float()
        return out_J

    def compared(self) -> list[Compared]:
        """The comparisons that judge the members: within one kind and one fold. None where one fold holds everything."""
        if len(set(self.fold_J)) < 2:
            return []
        score_J = self._unseen(
            self.members,
            lambda _, utility_N, rows: (
                utility_N[rows.reply_J]
                - torch.where(rows.kind_J == KINDS.index("preference"), utility_N[rows.other_J], 0.0)
            ),
        )
        strata: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (kind, fold) in enumerate(zip(self.evidence.kind_J.tolist(), self.fold_J, strict=True)):
            strata[kind, fold].append(row)
        return [
            Compared(rows, score_J[rows], None if KINDS[kind] == "preference" else self.evidence.value_J[rows])
            for (kind, _), rows in strata.items()
        ]

    def calibration(self) -> list[tuple[float, float, int]]:
        """Of unseen thumbs, in ten bins: the chance of a thumb up foretold, the share seen, and how many."""
        chance_J = self._unseen(
            self.members, lambda m, u, rows: torch.sigmoid(m.links.slope("thumb") * u[rows.reply_J] + m.links.offset)
        )
        thumbs = self.evidence.kind_J == KINDS.index("thumb")
        chance_J, up_J = chance_J[thumbs], self.evidence.value_J[thumbs]
        bin_J = (chance_J * 10).long().clamp(0, 9)
        inside = [bin_J == one for one in bin_J.unique()]
        return [(float(chance_J[one].mean()), float(up_J[one].mean()), int(one.sum())) for one in inside]


def chance_nll(judgements: Sequence[Judgement]) -> float:
    """Nats a judgement of a model that knows how often each value is given and nothing else."""
    total = 0.0
    for kind in KINDS:
        counts = Counter(judgement.value for judgement in judgements if judgement.kind == kind)
        if kind == "preference":
            total += counts.total() * math.log(2)
        else:
            total -= sum(count * math.log(count / counts.total()) for count in counts.values())
    return total / max(len(judgements), 1)
