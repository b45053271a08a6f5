"""The recipe's numbers: what PPO, or an objective in its place, is told, and what follows from the model's size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learner.config import LearnerConfig
from learner.objectives import PPO, RLOO, Objective, Reinforce, a2c


@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings of PPO and of what may stand in its place; where a default is not the recipe's, benchmarks/LOG.md says why."""

    objective: str = "ppo"
    """One of `objective_of`, or of learner/direct.py."""
    rollouts: int = 128
    """Fresh replies of a batch."""
    minibatch: int = 16
    """Replies of an optimiser step."""
    epochs: int = 1
    """Passes of PPO over a batch; other objectives make one."""
    samples: int = 4
    """Replies to each prompt of RLOO's batch."""
    temperature: float = 1.0
    """Of the rollouts, and of the distributions that the ratio and the KL of a batch are between."""
    entropy: float = 0.0
    """What a nat of a token's entropy is worth beside the objective."""
    live_share: float = 0.25
    """Of a batch: at most so much of it are replies that people were served."""
    live_trust: float = 1.0
    """By how much what a person said of a served reply moves its score, in standard deviations at a full surprise."""
    batches: int = 16
    """At most so many in an update; one more is sampled to see what the last of them brought."""
    lr: float = 2e-3
    """Of AdamW, at its highest."""
    warmup_steps: int = 4
    """Optimiser steps over which the learning rate rises."""
    gamma: float = 1.0
    """Discount of a reward one token later."""
    lam: float = 0.95
    """λ of GAE: 0 trusts the values, 1 the returns."""
    clip: float = 0.2
    """The ratio pays no further than this from 1."""
    dual_clip: float = 3.0
    """And costs no more than so many times the advantage, where that is below 0."""
    score_clip: float = 5.0
    """Bound of the score on both sides, in standard deviations of the reference's."""
    missing_eos_penalty: float = 1.0
    """Off the score of a reply that was cut at the limit."""
    repetition_penalty: float = 5.0
    """Times the share of four-token phrases that were said before in the reply: nothing is to be gained by saying it twice."""
    beta: float = 0.05
    """Price of a nat, and of the χ² beside it, at the start."""
    chi_share: float = 0.5
    """Weight of the χ² beside the KL in that price: it costs little to say more often what the base says anyway, and much to say
    what it hardly ever says, of which the reward model has seen nothing."""
    chi_bound: float = 20.0
    """A token so many times as likely as under the reference costs no less than one still more likely."""
    kl_target: float = 1.8
    """Nats a reply that the price steers to."""
    kl_limit: float = 2.3
    """Nats a reply, on fresh samples, that the policy may be from the reference when the update has ended."""
    overrun: float = 1.4
    """Times the limit, at which the update ends at once: from beyond the limit the policy goes back to it (Improver.go_back)."""
    kl_horizon: float = 20.0
    """Batches over which a full error would double the price."""
    step_limit: float = 0.02
    """Nats a token (k3) between the rollouts' policy and the new one, at which a batch's epochs end."""
    kl_price: float = 0.05
    """Of the mean score, in standard deviations of the reference's, that a nat a reply must bring to be worth it."""
    patience: int = 3
    """Batches that are not clearly worth more than the best before them, after which the update ends."""
    max_mean_ratio: float = 10.0
    """A minibatch whose mean ratio is above this is skipped."""
    grad_clip: float = 1.0
    """Largest norm of a step's gradient."""
    micro_tokens: int = 1024
    """Padded tokens of one forward pass."""


def objective_of(config: PPOConfig) -> Objective:
    """The objective of that name, with its settings. Raises KeyError."""
    known: dict[str, Objective] = {
        "ppo": PPO(
            epochs=config.epochs, gamma=config.gamma, lam=config.lam, clip=config.clip, dual_clip=config.dual_clip
        ),
        "a2c": a2c(config.gamma, config.lam),
        "reinforce": Reinforce(gamma=config.gamma),
        "rloo": RLOO(samples=config.samples),
    }
    return known[config.objective]


def learning_rate(parameters: int) -> float:
    """2e-3 at two million parameters, falling with the square root of the size: 2e-4 at 200 million, 3e-5 at 7 billion."""
    return 2e-3 * min(1.0, math.sqrt(2e6 / parameters))


def ppo_config(config: LearnerConfig, parameters: int) -> PPOConfig:
    """The learner's settings as PPO takes them; `parameters` of the base choose the learning rate where none is set."""
    lr = config.learning_rate or learning_rate(parameters)
    return PPOConfig(
        objective=config.objective,
        entropy=config.entropy,
        temperature=config.rollout_temperature,
        live_share=config.live_share,
        rollouts=config.rollouts,
        minibatch=config.minibatch,
        epochs=config.ppo_epochs,
        batches=config.update_batches,
        lr=lr,
        kl_target=min(config.kl_target, config.kl_limit),
        kl_limit=config.kl_limit,
    )
