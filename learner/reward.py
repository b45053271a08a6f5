"""The reward model: one utility of a reply, learned from everything people say, and honest about how much it knows.

Fitted anew at each update, by cross-fitting: the judgements are dealt into folds, and each member of the ensemble is a fit to all
but one of them. What a member says of the fold it never saw is the evidence of the gate; what the members say together,
less a price for their disagreement, is the score that PPO climbs.

Axes: N judged replies, B replies, F features, J judgements, K members (one a fold).
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learner.concordance import Compared, concordance
from learner.losses import Links, rater_numbers
from learner.words import Tables, Words

if TYPE_CHECKING:
    from learner.model import Tokens
    from learner.state import Judgement

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
    """One rater's judgements weigh at most this share of all, where enough raters are known."""
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
        root_NN = torch.linalg.cholesky(gram_NN + 1e-4 * torch.eye(len(rows), dtype=gram_NN.dtype))
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
    slopes = [
        raw for kind, raw in links.raw_slopes.items() if kind != "thumb"
    ]  # the weights' own scale does for thumbs
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


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What the reward model learned, and how well it foretells judgements that it never saw."""

    judgements: dict[str, int]
    raters: int
    folds_by: str
    auroc: float | None
    """Of cross-fitted predictions; pairs of stars and preferences count as comparisons too. None: nothing to compare."""
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

    def lower(self, z: float) -> float:
        """A bound below the true AUROC."""
        return 0.0 if self.auroc is None else self.auroc - z * self.auroc_error

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class RewardModel:
    """The ensemble after a fit. Its score has mean 0 and standard deviation 1 over the reference policy's own replies."""

    def __init__(self, embeddings_VH: Tensor, eos_ids: Collection[int], config: RewardConfig) -> None:
        self.embeddings_VH, self.eos_ids, self.config = embeddings_VH, eos_ids, config
        self.tables: Tables | None = None
        self.links: list[Links] = []
        self.shift, self.scale = 0.0, 1.0

    def fit(
        self,
        judgements: Sequence[Judgement],
        reference: Sequence[Tokens],
        seed: int,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> RewardReport:
        """Learn from all judgements anew. `reference`: replies of the reference policy, which fix the scale of the score."""
        fit = CrossFit(self.embeddings_VH, self.eos_ids, judgements, self.config, seed, progress)
        self.tables, self.links = (
            fit.words.tables(torch.stack([m.weights_F for m in fit.members])),
            [m.links for m in fit.members],
        )
        self._normalise([sample.reply_ids for sample in reference])
        return fit.report(self, reference)

    def _normalise(self, replies: Sequence[Sequence[int]]) -> None:
        """Mean 0 and standard deviation 1 over these replies: for each member, links following, and for the score of all."""
        assert self.tables is not None
        utility_KB = self.tables.utilities(replies)
        shift_K, scale_K = utility_KB.mean(1), utility_KB.std(1).clamp_min(1e-6)
        self.tables = self.tables.rescaled(shift_K, scale_K)
        for links, shift, scale in zip(self.links, shift_K.tolist(), scale_K.tolist(), strict=True):
            links.rescale(shift, scale)
        self.shift, self.scale = 0.0, 1.0
        score_B = self._combine(self.tables.utilities(replies))
        self.shift, self.scale = float(score_B.mean()), max(float(score_B.std()), 1e-6)

    def _combine(self, utility_K: Tensor) -> Tensor:
        """The members' mean less κ standard deviations, on the score's scale; members stand first."""
        score = utility_K.mean(0) - self.config.pessimism * utility_K.std(0)
        return (score - self.shift) / self.scale

    def score(self, samples: Sequence[Tokens]) -> Tensor:
        """The score of each reply, [B]."""
        assert self.tables is not None, "fit the reward model first"
        return self._combine(self.tables.utilities([sample.reply_ids for sample in samples]))

    def running(self, sample: Tokens) -> Tensor:
        """The score of the reply said so far, before its first token and after each, [T+1]."""
        assert self.tables is not None, "fit the reward model first"
        return self._combine(self.tables.running(sample.reply_ids))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The fitted tables and the scale of the score; of the links, what turns the score into a chance."""
        if self.tables is None:
            return {}, {}
        names = [name for name in Tables.__slots__ if name != "eos_ids"]
        return {name: getattr(self.tables, name) for name in names}, {"shift": self.shift, "scale": self.scale}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        if tensors:
            self.tables = Tables(**tensors, eos_ids=frozenset(self.eos_ids))
            self.shift, self.scale = float(meta["shift"]), float(meta["scale"])


class CrossFit:
    """The members, each fitted to all folds but one, and what each says of the fold it never saw."""

    def __init__(
        self,
        embeddings_VH: Tensor,
        eos_ids: Collection[int],
        judgements: Sequence[Judgement],
        config: RewardConfig,
        seed: int,
        progress: Callable[[float], None],
    ) -> None:
        self.judgements, self.config = judgements, config
        self.fold_J, self.by = deal(judgements, config.folds, seed)
        replies: dict[tuple[int, ...], int] = {}
        for judgement in judgements:
            for sample in (judgement.reply, judgement.other):
                if sample is not None:
                    replies.setdefault(sample.reply_ids, len(replies))
        self.raters = rater_numbers([judgement.user for judgement in judgements])
        self.evidence = self._evidence(replies)
        self.words = Words(embeddings_VH, eos_ids, list(replies))
        self.features_NF = self.words.features(list(replies))
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

    def _evidence(self, replies: Mapping[tuple[int, ...], int]) -> Evidence:
        return Evidence(
            kind_J=torch.tensor([KINDS.index(judgement.kind) for judgement in self.judgements]),
            reply_J=torch.tensor([replies[judgement.reply.reply_ids] for judgement in self.judgements]),
            other_J=torch.tensor(
                [replies[(judgement.other or judgement.reply).reply_ids] for judgement in self.judgements]
            ),
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
        """The comparisons that judge the members: within one kind and one fold."""
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

    def report(self, model: RewardModel, reference: Sequence[Tokens]) -> RewardReport:
        """How good the members are."""
        by_prompt = [judgement.reply.prompt_ids for judgement in self.judgements]
        by_rater = [judgement.user or row for row, judgement in enumerate(self.judgements)]
        found = concordance(self.compared(), [by_prompt, by_rater])
        assert model.tables is not None
        lengths_B = torch.tensor([float(len(sample.reply_ids)) for sample in reference])
        utility_KB = model.tables.utilities([sample.reply_ids for sample in reference])
        return RewardReport(
            judgements=dict(Counter(judgement.kind for judgement in self.judgements)),
            raters=len(self.raters),
            folds_by=self.by,
            auroc=None if found is None else found.share,
            auroc_error=0.0 if found is None else found.error,
            comparisons=0 if found is None else found.comparisons,
            nll=float(self.unseen_loss_J.mean()),
            chance_nll=chance_nll(self.judgements),
            calibration_error=self._calibration_error(),
            length_correlation=correlation(model.score(reference), lengths_B),
            penalty=self.penalty,
            agreement=_agreement(utility_KB),
        )

    def _calibration_error(self) -> float:
        chance_J = self._unseen(
            self.members, lambda m, u, rows: torch.sigmoid(m.links.slope("thumb") * u[rows.reply_J] + m.links.offset)
        )
        thumbs = self.evidence.kind_J == KINDS.index("thumb")
        if not thumbs.any():
            return 0.0
        chance_J, up_J = chance_J[thumbs], self.evidence.value_J[thumbs]
        bin_J = (chance_J * 10).long().clamp(0, 9)
        gaps = [abs(float((chance_J - up_J)[bin_J == one].sum())) for one in bin_J.unique()]
        return sum(gaps) / len(up_J)


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
