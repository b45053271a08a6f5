"""What a batch of rollouts teaches: an objective says what each token was worth, and what the loss is.

Tensors in, tensors out; the loop around it is learner/improve.py's. Each climbs the same rewards: the score on a reply's last
token, less β times the divergence from the reference on every token. Axes: B replies, T positions of a padded batch.

References: PPO (1707.06347); A2C as PPO with one epoch and nothing to clip (2205.09123); REINFORCE with a baseline (Williams
1992); RLOO (2402.14740).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner import ppo


class Objective(Protocol):
    """How advantages are made, and what the loss is."""

    @property
    def epochs(self) -> int:
        """Passes over a batch."""
        ...

    @property
    def samples(self) -> int:
        """Replies to each prompt of a batch, which follow each other."""
        ...

    @property
    def critic(self) -> bool:
        """Whether advantages ask for the values of states."""
        ...

    def advantages(self, rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """How much better each token was than what was to be expected, [B, T]; not whitened yet."""
        ...

    def loss(self, new_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, tokens: int) -> Tensor:
        """To be minimised; `tokens` are those of the whole minibatch, so that its micro-batches' losses add up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO:
    """A critic, GAE, and a clipped surrogate: no step goes far from the policy that made the batch, in one pass or several."""

    epochs: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float = 3.0
    samples: int = 1
    critic: bool = True

    def advantages(self, rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return ppo.gae(rewards_BT, values_BT, mask_BT, gamma=self.gamma, lam=self.lam)

    def loss(self, new_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, tokens: int) -> Tensor:
        return ppo.policy_loss(
            new_BT, old_BT, advantages_BT, mask_BT, clip=self.clip, dual_clip=self.dual_clip, tokens=tokens
        )


def a2c(gamma: float, lam: float) -> PPO:
    """PPO in one pass without the clip: −Σ ρA ÷ tokens; ρ is 1 but for what the batch's first minibatches moved (2205.09123)."""
    return PPO(epochs=1, gamma=gamma, lam=lam, clip=math.inf, dual_clip=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinforce:
    """−Σ A·log π ÷ tokens with A = G − V, what was still to come less a baseline: the gradient as defined (Williams 1992)."""

    epochs: int = 1
    gamma: float = 1.0
    samples: int = 1
    critic: bool = True

    def advantages(self, rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, ppo.returns(rewards_BT, mask_BT, self.gamma) - values_BT, 0.0)

    def loss(self, new_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, tokens: int) -> Tensor:  # noqa: ARG002
        weighed_BT = torch.where(mask_BT, advantages_BT, 0.0) * new_BT
        return -ppo.masked_sum(weighed_BT, mask_BT) / tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RLOO(Reinforce):
    """REINFORCE on whole replies, the baseline of each being the mean of the other replies to its prompt (2402.14740, eq. 6)."""

    samples: int = 4
    critic: bool = False

    def advantages(self, rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG002
        reply_B = leave_one_out(torch.where(mask_BT, rewards_BT, 0.0).sum(1), self.samples)
        return torch.where(mask_BT, reply_B[:, None], 0.0)


def leave_one_out(rewards_B: Tensor, samples: int) -> Tensor:
    """Each reply's reward less the mean of the others to its prompt, [B]; the `samples` replies to a prompt follow each other."""
    rewards_PS = rewards_B.view(-1, samples)
    others_PS = (rewards_PS.sum(1, keepdim=True) - rewards_PS) / (samples - 1)
    return (rewards_PS - others_PS).flatten()


def entropy_loss(entropy_BT: Tensor, mask_BT: Tensor, tokens: int) -> Tensor:
    """−Σ entropy of the policy at each token ÷ tokens: what the entropy coefficient multiplies (1602.01783, section 4)."""
    return -ppo.masked_sum(entropy_BT, mask_BT) / tokens
