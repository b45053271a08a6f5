"""How often a score puts the better reply higher, and how sure one can be of it.

AUROC of thumbs, the same for ratings (pairs of different stars), accuracy of preferences, in one number. Its standard error
is the largest of three: judgements of one prompt go together, those of one rater do (influence functions summed over
clusters; Obuchowski 1997), or the score knows nothing (Jonckheere 1954), which keeps a few lucky judgements from looking certain.

Axes: J judgements.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Compared:
    """Judgements that may be compared with one another: same kind, scored by the same member."""

    index_J: list[int]
    """Which judgements these are, for the clusters; a ranking stands here once for each of its replies."""
    score_J: Tensor
    """The score of the reply; of a preference, chosen less rejected."""
    value_J: Tensor | None
    """What was said, the better the larger; None for preferences, each of which is a comparison by itself."""


@dataclass(frozen=True, slots=True)
class Concordance:
    """Share of comparisons in which the better reply scores higher (ties count half), with its standard error."""

    share: float
    error: float
    comparisons: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What one stratum adds."""

    index_J: list[int]
    share: float
    influence_J: Tensor
    chance_variance: float
    """Of the share, if the score knew nothing."""
    comparisons: int


def concordance(strata: Sequence[Compared], clusters: Sequence[Sequence[Hashable]]) -> Concordance | None:
    """Over all strata, each weighing as much as it has judgements; None when there is nothing to compare.

    `clusters`: ways to group all judgements (by prompt, by rater).
    """
    parts = [part for part in map(_part, strata) if part is not None]
    total = sum(len(set(part.index_J)) for part in parts)
    if not total:
        return None
    influence_J = torch.zeros(len(clusters[0]), dtype=torch.double)
    share = chance = 0.0
    for part in parts:
        weight = len(set(part.index_J)) / total
        share += weight * part.share
        chance += weight**2 * part.chance_variance
        influence_J.index_add_(0, torch.tensor(part.index_J), weight * part.influence_J)
    error = max(math.sqrt(chance), *(_clustered(influence_J, grouping) for grouping in clusters))
    return Concordance(share, error, sum(part.comparisons for part in parts))


def _part(stratum: Compared) -> _Part | None:
    score_J = stratum.score_J.double()
    if stratum.value_J is None:
        right_J, count = _won(score_J), len(score_J)
        share = float(right_J.mean())
        return _Part(stratum.index_J, share, (right_J - share) / count, 0.25 / count, count)
    better_JJ = stratum.value_J[:, None] > stratum.value_J[None]
    comparisons = int(better_JJ.sum())
    if not comparisons:
        return None
    right_JJ = torch.where(better_JJ, _won(score_J[:, None] - score_J[None]), 0.0)
    share = float(right_JJ.sum()) / comparisons
    excess_JJ = torch.where(better_JJ, right_JJ - share, 0.0) / comparisons
    sizes = [len(score_J), *(-size for size in stratum.value_J.unique(return_counts=True)[1].tolist())]
    chance = sum(math.copysign(size**2 * (2 * abs(size) + 3), size) for size in sizes) / 72 / comparisons**2
    return _Part(stratum.index_J, share, excess_JJ.sum(0) + excess_JJ.sum(1), chance, comparisons)


def _won(difference: Tensor) -> Tensor:
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def _clustered(influence_J: Tensor, cluster_J: Sequence[Hashable]) -> float:
    """The standard error when judgements of one cluster may go together."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(cluster_J))}
    sums = torch.zeros(len(numbers), dtype=torch.double)
    sums.index_add_(0, torch.tensor([numbers[cluster] for cluster in cluster_J]), influence_J)
    return math.sqrt(len(numbers) / max(len(numbers) - 1, 1) * float(sums.square().sum()))
