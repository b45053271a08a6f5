"""Rollouts, and what each of their tokens was worth: the experience of one batch.

Axes: B replies, T positions of a padded batch, N tokens of all replies, H hidden width, S numbers of a state.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from learner import ppo
from learner.critic import crossfit_values
from learner.judgement import Tokens
from learner.live import LARGEST_WEIGHT, Live
from learner.model import Batch, Comparison, LearnerModel
from learner.recipe import PPOConfig, objective_of
from learner.rollouts import Prompt, Rollout, Sampler, repetition
from learner.steps import POLICY, Steps
from serving.lora import AdapterWeights


class Scorer(Protocol):
    """What PPO asks of a reward model."""

    def running(self, samples: Sequence[Tokens], states_BS: Tensor) -> list[Tensor]:
        """For each reply the score of what was said so far, before its first token and after each, [T+1].

        `states_BS`: what the base makes of the replies, see LearnerModel.states.
        """
        ...


@dataclass(slots=True)
class Experience:
    """A batch of rollouts with what was made of them, [B, T]."""

    batch: Batch
    old_BT: Tensor
    rewards_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    figures: dict[str, float]


class Collector:
    """Makes the experience of each batch of one update."""

    def __init__(
        self,
        model: LearnerModel,
        reward: Scorer,
        sampler: Sampler,
        config: PPOConfig,
        steps: Steps,
        seeds: random.Random,
        live: Live | None = None,
    ) -> None:
        self.model, self.reward, self.sampler, self.config = model, reward, sampler, config
        self.objective, self.each, self.live = objective_of(config), steps.each, live
        self.seeds = seeds

    def draw_live(self) -> list[Rollout]:
        """Live replies that may serve in the next batch. An objective that compares replies to one prompt takes none."""
        if self.live is None or self.objective.samples > 1:
            return []

        @torch.no_grad()
        def prox(taken: Sequence[Tokens]) -> list[list[float]]:
            batch = Batch.of(taken)
            found = {}
            for rows, said_BT in self.each(
                lambda _, part: self.model.logprobs(part, POLICY, self.config.temperature), batch
            ):
                for place, row in enumerate(rows):
                    found[row] = said_BT[place][batch.mask_BT[row, : said_BT.shape[1]]].tolist()
            return [found[row] for row in range(len(taken))]

        return self.live.draw(int(self.config.live_share * self.config.rollouts), prox)

    def roll_out(
        self, queue: Iterator[Prompt], weights: AdapterWeights, count: int, temperature: float | None = None
    ) -> list[Rollout]:
        """So many fresh replies to the next prompts, as many to each as the objective compares; by default at the recipe's
        temperature."""
        samples = self.objective.samples
        asked = itertools.islice(queue, max(count // samples, 1))
        prompts = [prompt for prompt in asked for _ in range(samples)]
        return self.sampler.sample(prompts, weights, self.seeds.getrandbits(32), temperature or self.config.temperature)

    @torch.no_grad()
    def look_at(
        self, fresh: Sequence[Rollout], served: Sequence[Rollout] = (), beta: float | None = None
    ) -> Experience:
        """Score replies and work out what each token was worth; `beta`: the price of a nat, by default that at the start."""
        config, rollouts, batch = self.config, [*fresh, *served], Batch.of([*fresh, *served])
        seen, mask_BT = self.compare(batch), batch.mask_BT
        running = [
            one.clamp(-config.score_clip, config.score_clip) for one in self.reward.running(rollouts, seen.states_BS)
        ]
        scores_B = self.scores(running, fresh, served)
        k1_BT = ppo.k1(seen.new_BT, seen.base_BT, mask_BT)
        divergence_BT = k1_BT + config.chi_share * ppo.chi2(k1_BT, config.chi_bound)
        rewards_BT = ppo.token_rewards(scores_B, divergence_BT, mask_BT, config.beta if beta is None else beta)
        returns_BT, values_BT = ppo.returns(rewards_BT, mask_BT, config.gamma), torch.zeros(mask_BT.shape)
        if self.objective.critic:
            running_N1 = torch.cat([running_T[:-1] for running_T in running])[:, None]
            features_NF = torch.cat([seen.hidden_NH, running_N1], 1)
            values_BT = batch.spread(crossfit_values(features_NF, returns_BT[mask_BT], mask_BT.nonzero()[:, 0]))
        advantages_BT = ppo.whiten(self.objective.advantages(rewards_BT, values_BT, mask_BT), mask_BT)
        figures = self.figures(fresh, scores_B, seen.kl_BT, k1_BT)
        own = slice(len(fresh))
        # the mean of −log p over the policy's own samples: an estimate without bias that costs nothing
        figures["entropy"] = -float(ppo.masked_mean(seen.new_BT[own], mask_BT[own]))
        figures["explained_variance"] = ppo.explained_variance(values_BT[own], returns_BT[own], mask_BT[own])
        if served:
            figures["live"] = float(len(served))
            behaviour_BT = batch.spread(torch.tensor([p for one in rollouts for p in one.logprobs]))
            behaviour_BT[own] = seen.new_BT[own]
            advantages_BT *= ppo.staleness_weight(seen.new_BT, behaviour_BT, mask_BT, LARGEST_WEIGHT)
        return Experience(batch, seen.new_BT, rewards_BT, values_BT, advantages_BT, figures)

    def mean_kl(self, fresh: Sequence[Rollout]) -> float:
        """KL of the policy to the reference at temperature 1, nats a reply, on replies that the policy made."""
        return float(self.compare(Batch.of(fresh), 1.0).kl_BT.sum(1).mean())

    def compare(self, batch: Batch, temperature: float | None = None) -> Comparison:
        """The policy beside the reference, by groups of rows that threads share."""
        tokens = int(batch.mask_BT.sum())
        number_BT = batch.spread(torch.arange(tokens))
        new_BT, base_BT, kl_BT = (torch.zeros(batch.mask_BT.shape) for _ in range(3))
        hidden_NH = torch.zeros(tokens, self.model.width)
        states_BS = torch.zeros(len(batch.lengths), 2 * self.model.width)
        temperature = temperature or self.config.temperature
        for rows, found in self.each(lambda _, part: self.model.compare(part, POLICY, temperature), batch):
            width = found.new_BT.shape[1]
            new_BT[rows, :width], base_BT[rows, :width], kl_BT[rows, :width] = found.new_BT, found.base_BT, found.kl_BT
            hidden_NH[number_BT[rows][batch.mask_BT[rows]]] = found.hidden_NH
            states_BS[rows] = found.states_BS
        return Comparison(new_BT, base_BT, kl_BT, hidden_NH, states_BS)

    def scores(self, running: Sequence[Tensor], fresh: Sequence[Rollout], served: Sequence[Rollout]) -> Tensor:
        """What each reply is paid at its end, [B]: the reward model's score, corrected by what people said of a live one,
        less the price of what no score knows: that it was cut off, or says the same again."""
        config, rollouts = self.config, [*fresh, *served]
        scores_B = torch.stack([running_T[-1] for running_T in running])
        if self.live is not None:
            said_B = torch.tensor([0.0] * len(fresh) + [self.live.said(one) for one in served])
            scores_B = (scores_B + config.live_trust * said_B).clamp(-config.score_clip, config.score_clip)
        cut_B = torch.tensor([not rollout.ended for rollout in rollouts])
        repeated_B = torch.tensor([repetition(rollout.reply_ids) for rollout in rollouts])
        return scores_B - config.missing_eos_penalty * cut_B - config.repetition_penalty * repeated_B

    def figures(self, fresh: Sequence[Rollout], scores_B: Tensor, kl_BT: Tensor, k1_BT: Tensor) -> dict[str, float]:
        """Means over the fresh replies, which stand first."""
        own = slice(len(fresh))
        return {
            "score": float(scores_B[own].mean()),
            "kl": float(kl_BT[own].sum(1).mean()),
            "k1": float(k1_BT[own].sum(1).mean()),
            "tokens": fmean(len(rollout.reply_ids) for rollout in fresh),
            "ended": fmean(rollout.ended for rollout in fresh),
            "repetition": fmean(repetition(rollout.reply_ids) for rollout in fresh),
        }
