"""What people say, as likelihoods of one utility r: a loss for each kind of feedback.

A judgement's loss is its own negative log-likelihood, in nats; nothing here averages. Axes: B judgements, K replies of a
ranking, S levels of a rating. References: Bradley–Terry with label smoothing; rankings by Plackett–Luce; thumbs as in KTO's
setting (2404.04656); ratings by the proportional-odds (cumulative link) model of McCullagh 1980, which CORAL approximates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

RATING_LEVELS = 5
CHANNELS = ("thumb", "rating", "preference")
"""What every fit has a slope for; "thumb:safe" is thumbs on an aspect, "signal:copied" a signal of that name."""
NEGATIVE = ("regenerated", "abandoned")
"""Signals that speak against a reply, as long as nothing else is known of them."""
OPEN = ("dwell",)
"""Signals that may speak for a reply or against it: who stays long may be pleased or puzzled."""


def preference_loss(difference_B: Tensor, smoothing: float) -> Tensor:
    """−log σ(r_chosen − r_rejected), with `smoothing` of the belief on the other answer."""
    return -(1 - smoothing) * functional.logsigmoid(difference_B) - smoothing * functional.logsigmoid(-difference_B)


def ranking_loss(utility_BK: Tensor, mask_BK: Tensor, smoothing: float) -> Tensor:
    """−log P of the order by Plackett–Luce, ÷ (K − 1), with `smoothing` of the belief on the very opposite order.

    Utilities stand from best to worst, K ≥ 2 of them in each row of `mask_BK`; what is in other slots changes nothing. With
    K = 2 this is the preference loss of their difference.
    """
    utility_BK = torch.where(mask_BK, utility_BK, 0.0)
    order = torch.arange(utility_BK.shape[1])
    loss_B = torch.zeros_like(utility_BK[:, 0])
    for share, left_KK in ((1 - smoothing, order >= order[:, None]), (smoothing, order <= order[:, None])):
        left_BKK = left_KK & mask_BK[:, None] | torch.eye(len(order), dtype=torch.bool)
        total_BK = utility_BK[:, None].expand_as(left_BKK).masked_fill(~left_BKK, -math.inf).logsumexp(2)
        loss_B = loss_B + share * torch.where(mask_BK, total_BK - utility_BK, 0.0).sum(1)
    return loss_B / (mask_BK.sum(1) - 1)


def thumb_loss(logit_B: Tensor, up_B: Tensor) -> Tensor:
    """Binary cross-entropy of a thumb (1 up, 0 down), or of whether a signal came, against its log-odds."""
    return functional.binary_cross_entropy_with_logits(logit_B, up_B, reduction="none")


def rating_loss(utility_B: Tensor, level_B: Tensor, thresholds: Tensor) -> Tensor:
    """−log P(level) where P(level > k) = σ(utility − θ_k); levels count from 0, `thresholds` [S−1] increase.

    With one threshold this is the thumb loss of utility − θ.
    """
    above_BK = utility_B[:, None] - thresholds
    index_B1 = level_B[:, None]
    # P(level) = σ(u) − σ(v) = σ(u)·σ(−v)·(1 − e^(v−u)), u and v being the log-odds of reaching and of passing the level
    reached_B = functional.pad(above_BK, (1, 0), value=math.inf).gather(1, index_B1).squeeze(1)
    passed_B = functional.pad(above_BK, (0, 1), value=-math.inf).gather(1, index_B1).squeeze(1)
    return -(
        functional.logsigmoid(reached_B) + functional.logsigmoid(-passed_B) + torch.log1p(-(passed_B - reached_B).exp())
    )


class Links(nn.Module):
    """From the utility to what people do: a slope and an offset per channel, thresholds for ratings, a bias per rater.

    An aspect has a slope of its own for its thumbs and one for its ratings, not a utility of its own: the score stays one
    number, and how far "safe" goes with it is learned. Raters are numbered from 1; 0 is whoever gave no name, and has no bias.
    """

    def __init__(self, raters: int, smoothing: float = 0.05, channels: Sequence[str] = CHANNELS) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.raw_slopes = nn.ParameterDict({channel: torch.tensor(_raw_slope(channel)) for channel in channels})
        self.offsets = nn.ParameterDict(
            {channel: torch.tensor(1.5 if channel.startswith("rating") else 0.0) for channel in channels}
        )
        self.raw_gaps = nn.Parameter(torch.full((RATING_LEVELS - 2,), math.log(math.e - 1)))
        self.bias = nn.Parameter(torch.zeros(raters + 1))

    def slope(self, channel: str) -> Tensor:
        """How much a unit of utility moves the log-odds in this channel; positive, but for signals, which may tell either way."""
        raw: Tensor = self.raw_slopes[channel]
        return raw if channel.startswith("signal") else functional.softplus(raw)

    def logit(self, channel: str, utility_B: Tensor) -> Tensor:
        """Log-odds of a thumb up, of a second star, or of a signal, by somebody without bias."""
        offset: Tensor = self.offsets[channel]
        return self.slope(channel) * utility_B + offset

    def thresholds(self) -> Tensor:
        """θ_1 < … < θ_{S−1}, the first being 0: where that lies is the offset's to say."""
        gaps = functional.softplus(self.raw_gaps)
        return torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])

    def rater_bias(self, rater_B: Tensor) -> Tensor:
        """Each rater's leniency in log-odds; 0 for the unnamed."""
        return torch.where(rater_B > 0, self.bias[rater_B], 0.0)

    def thumb(self, utility_B: Tensor, up_B: Tensor, rater_B: Tensor, channel: str = "thumb") -> Tensor:
        """Loss of thumbs or signals, [B]."""
        return thumb_loss(self.logit(channel, utility_B) + self.rater_bias(rater_B), up_B)

    def rating(self, utility_B: Tensor, stars_B: Tensor, rater_B: Tensor, channel: str = "rating") -> Tensor:
        """Loss of ratings of 1 to 5 stars, [B]."""
        logit_B = self.logit(channel, utility_B) + self.rater_bias(rater_B)
        return rating_loss(logit_B, stars_B.long() - 1, self.thresholds())

    def preference(self, chosen_B: Tensor, rejected_B: Tensor, channel: str = "preference") -> Tensor:
        """Loss of preferences or corrections, [B]. A rater's bias falls out of a difference."""
        return preference_loss(self.slope(channel) * (chosen_B - rejected_B), self.smoothing)

    def ranking(self, utility_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """Loss of rankings, [B], with the slope of preferences: one of two replies is one."""
        return ranking_loss(self.slope("preference") * utility_BK, mask_BK, self.smoothing)

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Follow the utility's change to (r − shift) ÷ scale, so that no likelihood changes."""
        for channel, raw in self.raw_slopes.items():
            self.offsets[channel].add_(self.slope(channel) * shift)
            slope = self.slope(channel) * scale
            raw.copy_(slope if channel.startswith("signal") else slope + torch.log(-torch.expm1(-slope)))  # softplus⁻¹


def rater_numbers(users: Sequence[str | None]) -> dict[str, int]:
    """A number from 1 for each named rater, in the order of their first judgement."""
    return {user: number for number, user in enumerate(dict.fromkeys(user for user in users if user), 1)}


def _raw_slope(channel: str) -> float:
    """A slope of 1 to begin with; of a signal, whatever its name says."""
    kind, _, name = channel.partition(":")
    if kind == "signal":
        return 0.0 if name in OPEN else -1.0 if name in NEGATIVE else 1.0
    return math.log(math.e - 1)
