"""What people say, as likelihoods of one utility r: a loss for each kind of feedback.

A judgement's loss is its own negative log-likelihood, in nats; nothing here averages. Axes: B judgements, S levels of a rating.
References: Bradley–Terry with label smoothing; thumbs as in KTO's setting (2404.04656); ratings by the proportional-odds
(cumulative link) model of McCullagh 1980, which CORAL approximates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

RATING_LEVELS = 5


def preference_loss(difference_B: Tensor, smoothing: float) -> Tensor:
    """−log σ(r_chosen − r_rejected), with `smoothing` of the belief on the other answer."""
    return -(1 - smoothing) * functional.logsigmoid(difference_B) - smoothing * functional.logsigmoid(-difference_B)


def thumb_loss(logit_B: Tensor, up_B: Tensor) -> Tensor:
    """Binary cross-entropy of a thumb (1 up, 0 down) against the log-odds of a thumb up."""
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
    """From the utility to what people do: a slope per kind, an offset for thumbs, thresholds for ratings, a bias per rater.

    Raters are numbered from 1; 0 is whoever gave no name, and has no bias.
    """

    def __init__(self, raters: int, smoothing: float = 0.05) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.raw_slopes = nn.ParameterDict(
            {kind: torch.tensor(math.log(math.e - 1)) for kind in ("thumb", "rating", "preference")}
        )
        self.offset = nn.Parameter(torch.zeros(()))
        self.first_threshold = nn.Parameter(torch.tensor(-1.5))
        self.raw_gaps = nn.Parameter(torch.full((RATING_LEVELS - 2,), math.log(math.e - 1)))
        self.bias = nn.Parameter(torch.zeros(raters + 1))

    def slope(self, kind: str) -> Tensor:
        """How much a unit of utility moves the log-odds of this kind; always positive."""
        return functional.softplus(self.raw_slopes[kind])

    def thresholds(self) -> Tensor:
        """θ_1 < … < θ_{S−1}."""
        gaps = functional.softplus(self.raw_gaps)
        return torch.cat([self.first_threshold[None], self.first_threshold + gaps.cumsum(0)])

    def rater_bias(self, rater_B: Tensor) -> Tensor:
        """Each rater's leniency in log-odds; 0 for the unnamed."""
        return torch.where(rater_B > 0, self.bias[rater_B], 0.0)

    def thumb(self, utility_B: Tensor, up_B: Tensor, rater_B: Tensor) -> Tensor:
        """Loss of thumbs, [B]."""
        return thumb_loss(self.slope("thumb") * utility_B + self.offset + self.rater_bias(rater_B), up_B)

    def rating(self, utility_B: Tensor, stars_B: Tensor, rater_B: Tensor) -> Tensor:
        """Loss of ratings of 1 to 5 stars, [B]."""
        logit_B = self.slope("rating") * utility_B + self.rater_bias(rater_B)
        return rating_loss(logit_B, stars_B.long() - 1, self.thresholds())

    def preference(self, chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
        """Loss of preferences, [B]. A rater's bias falls out of a difference."""
        return preference_loss(self.slope("preference") * (chosen_B - rejected_B), self.smoothing)

    @torch.no_grad()
    def rescale(self, shift: float, scale: float) -> None:
        """Follow the utility's change to (r − shift) ÷ scale, so that no likelihood changes."""
        self.offset.add_(self.slope("thumb") * shift)
        self.first_threshold.sub_(self.slope("rating") * shift)
        for raw in self.raw_slopes.values():
            slope = functional.softplus(raw) * scale
            raw.copy_(slope + torch.log(-torch.expm1(-slope)))  # softplus⁻¹


def rater_numbers(users: Sequence[str | None]) -> dict[str, int]:
    """A number from 1 for each named rater, in the order of their first judgement."""
    return {user: number for number, user in enumerate(dict.fromkeys(user for user in users if user), 1)}
