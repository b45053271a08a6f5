"""Judgements as tensors: which replies each is about, what it says, and how much it counts.

Axes: N judged replies, J judgements, K replies of the longest ranking.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner.judgement import Key, key_of
from learner.losses import CHANNELS, Links

if TYPE_CHECKING:
    from learner.crossfit import RewardConfig
    from learner.judgement import Judgement, Sample

PAIRS = ("preference", "correction")
NOBODY = -1
"""Stands in a ranking where it is shorter than others."""


def channel_of(judgement: Judgement) -> str:
    """The kind, with the aspect or the signal's name where there is one: what has a slope of its own."""
    if judgement.signal is not None:
        return f"{judgement.kind}:{judgement.signal}"
    return judgement.kind if judgement.aspect == "overall" else f"{judgement.kind}:{judgement.aspect}"


def kind_of(channel: str) -> str:
    return channel.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Judgements as tensors over the rows of a feature table."""

    channels: tuple[str, ...]
    channel_J: Tensor
    """Index into `channels`."""
    reply_J: Tensor
    other_J: Tensor
    """The worse reply of a preference or correction; of what is about one reply, that one."""
    ranked_JK: Tensor
    """The replies of a ranking from best to worst, then NOBODY."""
    value_J: Tensor
    rater_J: Tensor
    weight_J: Tensor

    @classmethod
    def of(
        cls,
        judgements: Sequence[Judgement],
        rows: Mapping[Key, int],
        raters: Mapping[str, int],
        config: RewardConfig,
    ) -> Evidence:
        """`rows`: prompt and reply → row of the feature table. `raters`: their numbers, from 1."""

        def row_of(sample: Sample) -> int:
            return rows[key_of(sample)]

        named = [channel_of(judgement) for judgement in judgements]
        channels = tuple(dict.fromkeys([*CHANNELS, *named]))
        longest = max((len(judgement.ranked) for judgement in judgements), default=0)
        ranked = [[*map(row_of, one.ranked)] + [NOBODY] * (longest - len(one.ranked)) for one in judgements]
        return cls(
            channels,
            channel_J=torch.tensor([channels.index(channel) for channel in named]),
            reply_J=torch.tensor([row_of(judgement.reply) for judgement in judgements]),
            other_J=torch.tensor([row_of(judgement.other or judgement.reply) for judgement in judgements]),
            ranked_JK=torch.tensor(ranked, dtype=torch.long).reshape(len(judgements), longest),
            value_J=torch.tensor([float(judgement.value) for judgement in judgements]),
            # how lenient somebody is says nothing of how often they copy
            rater_J=torch.tensor([0 if one.signal else raters.get(one.user or "", 0) for one in judgements]),
            weight_J=torch.tensor(weigh(judgements, config)),
        )

    def __len__(self) -> int:
        return len(self.channel_J)

    def at(self, index: Tensor) -> Evidence:
        """Some of the judgements, by number or by a mask."""
        names = [name for name in self.__slots__ if name != "channels"]
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def of_channel(self, channel: str) -> Tensor:
        """A mask of the judgements of this channel, [J]."""
        return self.channel_J == self.channels.index(channel)

    def heaviest(self) -> str:
        """The channel whose judgements weigh most together, the thumbs where none does; of rankings that of preferences, whose
        slope they share."""
        weights = {channel: float(self.weight_J[self.of_channel(channel)].sum()) for channel in self.channels}
        heaviest = max(weights, key=weights.__getitem__)
        return "preference" if heaviest == "ranking" else heaviest

    def replies(self) -> Tensor:
        """The rows of all replies that are judged, each once."""
        rows: Tensor = torch.cat([self.reply_J, self.other_J, self.ranked_JK[self.ranked_JK != NOBODY]]).unique()
        return rows

    def losses(self, utility_N: Tensor, links: Links, *, known_raters: bool = True) -> Tensor:
        """The negative log-likelihood of each judgement, [J]; `known_raters` False leaves the raters' biases out."""
        loss_J = utility_N.new_zeros(len(self))
        for channel in self.channels:
            here_J = self.of_channel(channel)
            if here_J.any():
                loss_J = loss_J.masked_scatter(here_J, self.at(here_J)._loss(channel, utility_N, links, known_raters))
        return loss_J

    def _loss(self, channel: str, utility_N: Tensor, links: Links, known_raters: bool) -> Tensor:
        """The same where all are of one channel."""
        reply_J, rater_J = utility_N[self.reply_J], self.rater_J if known_raters else torch.zeros_like(self.rater_J)
        match kind_of(channel):
            case "rating":
                return links.rating(reply_J, self.value_J, rater_J, channel)
            case "preference" | "correction":
                return links.preference(reply_J, utility_N[self.other_J], channel)
            case "ranking":
                return links.ranking(utility_N[self.ranked_JK], self.ranked_JK != NOBODY)
            case _:
                return links.thumb(reply_J, self.value_J, rater_J, channel)


def weigh(judgements: Sequence[Judgement], config: RewardConfig) -> list[float]:
    """The weight of each judgement: its own and that of its kind, less where one rater would have more than their share."""
    weights = [judgement.weight * config.weights[judgement.kind] / config.weights["thumb"] for judgement in judgements]
    given = defaultdict[str, float](float)
    for judgement, weight in zip(judgements, weights, strict=True):
        if judgement.user:
            given[judgement.user] += weight
    allowed = max(config.rater_share, 2 / len(given)) * sum(weights) if given else math.inf
    return [
        weight * (min(1.0, allowed / given[judgement.user]) if judgement.user else 1.0)
        for judgement, weight in zip(judgements, weights, strict=True)
    ]


def top_share(raters: Sequence[str | None], weights: Sequence[float]) -> float:
    """What the judgements of the heaviest rater weigh, of the weight of all; those of nobody in particular are no one's."""
    given = defaultdict[str, float](float)
    for rater, weight in zip(raters, weights, strict=True):
        if rater:
            given[rater] += weight
    return max(given.values(), default=0.0) / (sum(weights) or 1.0)


def chance_nll(judgements: Sequence[Judgement]) -> float:
    """Nats a judgement of a model that knows how often each value is given and nothing else."""
    total, values = 0.0, defaultdict[str, Counter[float]](Counter)
    for judgement in judgements:
        if judgement.kind in PAIRS:
            total += math.log(2)
        elif judgement.kind == "ranking":
            total += math.lgamma(len(judgement.ranked) + 1) / (len(judgement.ranked) - 1)
        else:
            values[channel_of(judgement)][judgement.value] += 1
    for counts in values.values():
        total -= sum(count * math.log(count / counts.total()) for count in counts.values())
    return total / max(len(judgements), 1)
