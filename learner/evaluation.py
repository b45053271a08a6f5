"""How well a reward model foretells judgements that it never saw, one kind at a time.

Axes: J judgements, N judged replies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.concordance import Compared, concordance
from learner.evidence import NOBODY, PAIRS, Evidence, kind_of
from learner.judgement import LIKED, Key, key_of
from learner.losses import CHANNELS
from learner.prepare import claims

if TYPE_CHECKING:
    from learner.crossfit import Tried
    from learner.judgement import Judgement

Figures = Mapping[str, float | None]
"""`count`; `nll`, nats each; `ece`; and, None where there is nothing to compare, `auroc` of thumbs and signals, `accuracy` of
preferences and corrections, Kendall's `tau` of ratings and rankings (ties in what was said left out)."""

Bin = tuple[float, float, int]

OVERALL = (*CHANNELS, "ranking")
"""What people say of a reply as a whole, and mean so. That an edited text differs from a sampled one, or what is copied, may be
foretold by what has nothing to do with its worth: it is no evidence for the gate."""
BINS = 10


def compared(tried: Sequence[Tried], counts: Callable[[str], bool] = OVERALL.__contains__) -> list[Compared]:
    """The comparisons that judge the members: within one channel and one member, and within a ranking."""
    return [
        one
        for part in tried
        for channel in part.evidence.channels
        if counts(channel)
        for one in _comparisons(part, channel)
    ]


def by_channel(tried: Sequence[Tried]) -> dict[str, Figures]:
    """The figures of each channel that was judged in."""
    return {
        channel: _figures(tried, channel)
        for channel in (tried[0].evidence.channels if tried else ())
        if any(part.evidence.of_channel(channel).any() for part in tried)
    }


def rater_agreement(judgements: Sequence[Judgement]) -> float | None:
    """Of all two people who said yes or no to the same (a reply, or one reply over another), the share who said the same."""
    said: defaultdict[object, Counter[int]] = defaultdict(Counter)
    for judgement in judgements:
        if judgement.user:
            for subject, side in claims(judgement):
                said[subject][side] += 1
    together = sum(_pairs(count) for counts in said.values() for count in counts.values())
    every = sum(_pairs(counts.total()) for counts in said.values())
    return together / every if every else None


def calibration(tried: Sequence[Tried], channel: str) -> list[Bin]:
    """How far what was foretold in this channel came true, in up to ten bins of what was foretold."""
    here = [part.evidence.of_channel(channel) for part in tried]
    if not any(here_J.any() for here_J in here):
        return []
    foretold = [_foretold(part.evidence.at(here_J), channel, part) for part, here_J in zip(tried, here, strict=True)]
    return bins(*(torch.cat(side) for side in zip(*foretold, strict=True)))


def surprises(tried: Sequence[Tried], judgements: Sequence[Judgement]) -> dict[Key, float]:
    """Of each reply that got thumbs what was said (1 up, 0 down) less what was foretold by who never saw it, in the mean."""
    gaps = defaultdict[Key, list[float]](list)
    for part in tried:
        here_J = part.evidence.of_channel("thumb")
        thumbs = part.evidence.at(here_J)
        gap_J = thumbs.value_J - part.links.logit("thumb", part.utility_N[thumbs.reply_J]).sigmoid()
        for row, gap in zip(here_J.nonzero()[:, 0].tolist(), gap_J.tolist(), strict=True):
            reply = judgements[part.index_J[row]].reply
            gaps[key_of(reply)].append(gap)
    return {key: fmean(found) for key, found in gaps.items()}


def bins(chance_J: Tensor, came_J: Tensor) -> list[Bin]:
    """Of each bin of the chances foretold that anything falls into: the mean chance, the share that came, and how many."""
    bin_J = (chance_J * BINS).long().clamp(0, BINS - 1)
    inside = [bin_J == one for one in bin_J.unique()]
    return [(float(chance_J[one].mean()), float(came_J[one].mean()), int(one.sum())) for one in inside]


def calibration_error(chance_J: Tensor, came_J: Tensor) -> float:
    """Mean distance of the foretold and the seen share of what came, over the bins."""
    gaps = [count * abs(chance - share) for chance, share, count in bins(chance_J, came_J)]
    return sum(gaps) / len(came_J)


def _figures(tried: Sequence[Tried], channel: str) -> Figures:
    rows = [part.evidence.of_channel(channel) for part in tried]
    losses_J = torch.cat([part.losses()[here_J] for part, here_J in zip(tried, rows, strict=True)])
    foretold = [_foretold(part.evidence.at(here_J), channel, part) for part, here_J in zip(tried, rows, strict=True)]
    chance_J, came_J = (torch.cat(side) for side in zip(*foretold, strict=True))
    judged = 1 + max(row for part in tried for row in part.index_J)
    ordered = concordance(compared(tried, channel.__eq__), [range(judged)])
    share = None if ordered is None else ordered.share
    kind = kind_of(channel)
    name = "accuracy" if kind in PAIRS else "tau" if kind in ("rating", "ranking") else "auroc"
    return {
        "count": len(losses_J),
        "nll": float(losses_J.mean()),
        "ece": calibration_error(chance_J, came_J),
        name: share if share is None or name != "tau" else 2 * share - 1,
    }


def _comparisons(part: Tried, channel: str) -> list[Compared]:
    here_J = part.evidence.of_channel(channel)
    if not here_J.any():
        return []
    evidence, index_J = part.evidence.at(here_J), [part.index_J[row] for row in here_J.nonzero()[:, 0].tolist()]
    if kind_of(channel) == "ranking":
        rankings = [(index, row_K[row_K != NOBODY]) for index, row_K in zip(index_J, evidence.ranked_JK, strict=True)]
        return [
            Compared([index] * len(row_K), part.utility_N[row_K], -torch.arange(len(row_K)))
            for index, row_K in rankings
        ]
    score_J = part.utility_N[evidence.reply_J]
    if kind_of(channel) in PAIRS:
        return [Compared(index_J, score_J - part.utility_N[evidence.other_J], None)]
    sign = 1 if kind_of(channel) != "signal" or part.links.slope(channel) >= 0 else -1
    return [Compared(index_J, sign * score_J, evidence.value_J)]


def _foretold(evidence: Evidence, channel: str, part: Tried) -> tuple[Tensor, Tensor]:
    """Chances of what can come or not, and whether it came: a thumb up, a signal, four stars; of two replies, either one."""
    links, utility_N = part.links, part.utility_N
    kind = kind_of(channel)
    if kind == "rating":
        logit_J = links.logit(channel, utility_N[evidence.reply_J]) - links.thresholds()[LIKED - 2]
        return logit_J.sigmoid(), (evidence.value_J >= LIKED).float()
    if kind not in (*PAIRS, "ranking"):
        return links.logit(channel, utility_N[evidence.reply_J]).sigmoid(), evidence.value_J
    if kind == "ranking":
        pairs = [pair for row_K in evidence.ranked_JK for pair in combinations(row_K[row_K != NOBODY].tolist(), 2)]
        better_J, worse_J = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    else:
        better_J, worse_J = evidence.reply_J, evidence.other_J
    logit_J = links.slope("preference" if kind == "ranking" else channel) * (utility_N[better_J] - utility_N[worse_J])
    chance_J = logit_J.sigmoid()
    return torch.cat([chance_J, 1 - chance_J]), torch.cat([torch.ones_like(chance_J), torch.zeros_like(chance_J)])


def _pairs(count: int) -> int:
    return count * (count - 1) // 2
