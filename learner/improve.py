"""Rollouts → scores → advantages → minibatches → optimiser steps, until the budget is spent; by PPO or another objective.

Axes: B replies, T positions of a padded batch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from learner import ppo
from learner.experience import Collector, Experience, Scorer
from learner.live import Live
from learner.model import Batch, LearnerModel
from learner.objectives import entropy_loss
from learner.recipe import PPOConfig, objective_of
from learner.rollouts import Prompt, Sampler, shuffled
from learner.steps import POLICY, Steps
from learner.worth import best, idle
from serving.lora import AdapterWeights


class Progress(Protocol):
    """Called again and again while an update runs: its phase, the share of it done, and a batch's figures once they are whole."""

    def __call__(self, phase: str, fraction: float, batch: Mapping[str, float] | None = None, /) -> None: ...


KL_AIM = 0.95
"""Share of the KL limit that a policy beyond it goes back to."""
TRIES = 4
"""At finding that share; each takes as many fresh replies as a batch has."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step found, before it was made."""

    moved: float
    """How far the policy was from the rollouts' already, k3, nats a token."""
    loss: float
    clipped: float
    """Share of the tokens whose ratio was outside the clip."""


@dataclass(slots=True)
class PolicyReport:
    """What an update did: one row of figures a batch, and why it ended."""

    batches: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    kept: int = 0
    """The batch whose policy was chosen."""
    share: float = 1.0
    """How much of it was taken: less than all where it was beyond the KL limit (Improver.go_back)."""
    back_s: float = 0.0
    """Seconds of making replies on the way back."""


class Improver:
    """One update of the policy: holds the optimiser, the price of a nat and the best weights so far."""

    def __init__(
        self,
        model: LearnerModel,
        reward: Scorer,
        sampler: Sampler,
        config: PPOConfig,
        seed: int,
        live: Live | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.objective = objective_of(config)
        self.policy = model.adapter(POLICY)
        self.steps = Steps(model, config)
        self.random = random.Random(seed)
        self.collector = Collector(model, reward, sampler, config, self.steps, self.random, live)
        self.control = ppo.KLController(config.beta, config.kl_target, config.kl_horizon)
        self.beat: Callable[[], None] = lambda: None
        """Called before each step of an optimiser, so that a learner goes on listening."""

    def close(self) -> None:
        """End the threads."""
        self.steps.close()

    def run(self, prompts: Sequence[Prompt], progress: Progress) -> PolicyReport:
        """Improve the policy's adapter until a stop fires, and leave the best weights within the budget in it."""
        config, report = self.config, PolicyReport()
        self.beat = lambda: progress("ppo", len(report.batches) / config.batches)
        queue = shuffled(prompts, self.random.getrandbits(32))
        kept: list[AdapterWeights] = []
        for number in range(config.batches + 1):
            progress("rollouts", number / config.batches)
            started = time.perf_counter()
            weights = self.policy.weights()
            served = self.collector.draw_live()
            rollouts = self.collector.roll_out(queue, weights, config.rollouts - len(served))
            sampled = time.perf_counter()
            self.beat()
            experience = self.collector.look_at(rollouts, served, self.control.beta)
            figures = experience.figures | {"beta": self.control.beta, "rollouts_s": sampled - started}
            report.batches.append(figures)
            kept.append(weights)
            report.stopped = self.reason_to_stop(report.batches)
            if report.stopped:
                break
            figures |= self.learn_from(experience)
            self.control.update(figures["kl"])
            figures["steps_s"] = time.perf_counter() - sampled
            progress("ppo", len(report.batches) / config.batches, figures)
        progress("ppo", 1.0, report.batches[-1])  # the last batch was looked at, not learned from
        report.kept = self.choose(report.batches)
        self.policy.load(kept[report.kept])
        self.beat = lambda: progress("ppo", 1.0)
        kl = report.batches[report.kept]["kl"] if config.temperature == 1 else self.measure(queue, report)
        if kl > config.kl_limit:
            self.go_back(queue, report, kl)
        return report

    def reason_to_stop(self, batches: Sequence[dict[str, float]]) -> str:
        """Why nothing more is learned after these batches; empty as long as something is."""
        config, kl = self.config, batches[-1]["kl"]
        if kl > config.overrun * config.kl_limit:
            return f"the KL to the reference reached {kl:.2f} nats a reply"
        if self.gains_nothing(batches):
            return f"{config.patience} batches brought no reward worth its KL"
        return f"all {config.batches} batches were used" if len(batches) > config.batches else ""

    def gains_nothing(self, batches: Sequence[dict[str, float]]) -> bool:
        """Whether it is no use to go on after these batches."""
        return idle(batches, self.config.kl_price) >= self.config.patience

    def choose(self, batches: Sequence[dict[str, float]]) -> int:
        """The batch whose policy is taken."""
        return best(batches, self.config.kl_price)

    def measure(self, queue: Iterator[Prompt], report: PolicyReport) -> float:
        """KL of the policy to the reference on fresh replies at temperature 1, as many as a batch has; nats a reply."""
        started = time.perf_counter()
        replies = self.collector.roll_out(queue, self.policy.weights(), self.config.rollouts, 1.0)
        report.back_s += time.perf_counter() - started
        self.beat()
        return self.collector.mean_kl(replies)

    def go_back(self, queue: Iterator[Prompt], report: PolicyReport, kl: float) -> None:
        """From beyond the limit go straight towards the reference, until fresh replies are just within it.

        What a policy learned beyond the limit costs less there than what it learns by stopping at it, which it reaches in a
        hurry: at one and the same KL more people are satisfied (benchmarks/LOG.md; towards the initialisation: 2406.16768).
        """
        weights, limit = self.policy.weights(), self.config.kl_limit
        aim = KL_AIM * limit
        within, beyond = (0.0, 0.0), (1.0, kl)  # a share of the weights, and its KL
        for _ in range(TRIES):
            share = within[0] + (beyond[0] - within[0]) * (aim - within[1]) / (beyond[1] - within[1])
            self.policy.load(shrunk(weights, share))
            kl = self.measure(queue, report)
            if kl > limit:
                beyond = share, kl
                continue
            within = share, kl
            if kl > KL_AIM * aim:
                break
        report.share = within[0] or beyond[0] * aim / beyond[1]
        self.policy.load(shrunk(weights, report.share))

    def minibatches(self, experience: Experience) -> Iterator[list[int]]:
        """The rows of each minibatch of one pass, in random order."""
        order = list(range(len(experience.old_BT)))
        self.random.shuffle(order)
        for start in range(0, len(order), self.config.minibatch):
            self.beat()
            yield order[start : start + self.config.minibatch]

    def learn_from(self, experience: Experience) -> dict[str, float]:
        """The batch's steps. Their figures: `moved` (k3 at the last, nats a token), `epochs`, `loss` and `clipped` (means)."""
        steps: list[Step] = []
        epochs = 0
        for _ in range(self.objective.epochs):
            for rows in self.minibatches(experience):
                if not steps or steps[-1].moved <= self.config.step_limit:
                    steps.append(self.policy_step(experience, rows))
            epochs += 1
            if steps[-1].moved > self.config.step_limit:
                break
        loss, clipped = fmean(step.loss for step in steps), fmean(step.clipped for step in steps)
        return {"moved": steps[-1].moved, "epochs": epochs, "loss": loss, "clipped": clipped}

    def policy_step(self, experience: Experience, rows: list[int]) -> Step:
        """One step of the policy."""
        config, batch = self.config, experience.batch
        tokens = int(batch.mask_BT[rows].sum())

        def work(micro: list[int], part: Batch) -> tuple[Sequence[Tensor], float, float, float, float]:
            width = part.ids_BT.shape[1]
            old_BT, advantages_BT = experience.old_BT[micro, :width], experience.advantages_BT[micro, :width]
            if config.entropy:
                new_BT, entropy_BT = self.model.logprobs_and_entropy(part, POLICY, config.temperature)
                loss = config.entropy * entropy_loss(entropy_BT, part.mask_BT, tokens)
            else:
                new_BT, loss = self.model.logprobs(part, POLICY, config.temperature), torch.zeros(())
            loss = loss + self.objective.loss(new_BT, old_BT, advantages_BT, part.mask_BT, tokens)
            gradients = torch.autograd.grad(loss, self.steps.parameters)
            with torch.no_grad():
                moved = float(ppo.k3(old_BT, new_BT, part.mask_BT).sum()) / tokens
                ratio_BT = ppo.ratio(new_BT, old_BT, part.mask_BT)
                ratio = float(ppo.masked_sum(ratio_BT, part.mask_BT)) / tokens
                clipped = ppo.clip_share(ratio_BT, part.mask_BT, config.clip) * int(part.mask_BT.sum()) / tokens
            return gradients, moved, ratio, float(loss.detach()), clipped

        gradients, *sums = zip(*(found for _, found in self.steps.each(work, batch, rows)), strict=True)
        moved, ratio, loss, clipped = map(sum, sums)
        self.steps.step(gradients, skip=ratio > config.max_mean_ratio)
        return Step(moved, loss, clipped)


def shrunk(weights: AdapterWeights, share: float) -> AdapterWeights:
    """The adapter that adds `share` of what this one adds."""
    return replace(weights, tensors={path: (down, up * share) for path, (down, up) in weights.tensors.items()})
