"""Rollouts → scores → advantages → minibatches → optimiser steps, until the budget is spent; by PPO or another objective.

Axes: B replies, T positions of a padded batch.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from learner import ppo
from learner.critic import crossfit_values
from learner.live import LARGEST_WEIGHT, Live
from learner.model import Batch, LearnerModel, Tokens, length_sorted
from learner.objectives import PPO, RLOO, Objective, Reinforce, a2c, entropy_loss
from learner.rollouts import Prompt, Rollout, Sampler, repetition, shuffled
from serving.lora import AdapterWeights

T = TypeVar("T")


class Progress(Protocol):
    """Called again and again while an update runs: its phase, the share of it done, and a batch's figures once they are whole."""

    def __call__(self, phase: str, fraction: float, batch: Mapping[str, float] | None = None, /) -> None: ...


POLICY = "policy"
MIN_GAIN = 0.05
"""Of a batch's worth, in standard deviations of the reference's score: less is chance."""
MOVED_KL = 0.1
"""Nats a reply from which on a policy counts as moved."""
KL_AIM = 0.95
"""Share of the KL limit that an update which overran it goes back to."""


@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings of PPO and of what may stand in its place; where a default is not the recipe's, benchmarks/LOG.md says why."""

    objective: str = "ppo"
    """One of `objective_of`, or of learner/direct.py."""
    rollouts: int = 128
    """Fresh replies of a batch."""
    minibatch: int = 32
    """Replies of an optimiser step."""
    epochs: int = 2
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
    lr: float = 1e-3
    warmup_steps: int = 4
    """Optimiser steps over which the learning rate rises."""
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float = 3.0
    score_clip: float = 5.0
    missing_eos_penalty: float = 1.0
    repetition_penalty: float = 5.0
    """Times the share of four-token phrases that were said before in the reply: nothing is to be gained by saying it twice."""
    beta: float = 0.1
    """Price of a nat, and of the χ² beside it, at the start."""
    chi_share: float = 0.5
    """Weight of the χ² beside the KL in that price: it costs little to say more often what the base says anyway, and much to say
    what it hardly ever says, of which the reward model has seen nothing."""
    chi_bound: float = 20.0
    """A token so many times as likely as under the reference costs no less than one still more likely."""
    kl_target: float = 1.5
    """Nats a reply that the price steers to."""
    kl_limit: float = 2.0
    """Nats a reply, on fresh samples, at which the update ends."""
    kl_horizon: float = 20.0
    step_limit: float = 0.02
    """Nats a token (k3) between the rollouts' policy and the new one, at which a batch's epochs end."""
    kl_price: float = 0.05
    """Of the mean score, in standard deviations of the reference's, that a nat a reply must bring to be worth it."""
    patience: int = 3
    """Batches that are not clearly worth more than the best before them, after which the update ends."""
    max_mean_ratio: float = 10.0
    """A minibatch whose mean ratio is above this is skipped."""
    grad_clip: float = 1.0
    micro_tokens: int = 1024
    """Padded tokens of one forward pass."""


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
    """The batch whose policy was taken."""


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
        self.model, self.reward, self.sampler, self.config = model, reward, sampler, config
        self.live = live
        self.objective = objective_of(config)
        self.policy = model.adapter(POLICY)
        self.parameters = list(self.policy.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimiser, lambda done: min(1.0, (done + 1) / config.warmup_steps))
        self.control = ppo.KLController(config.beta, config.kl_target, config.kl_horizon)
        self.random = random.Random(seed)
        self.threads = torch.get_num_threads() if model.base.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.beat: Callable[[], None] = lambda: None
        """Called before each step of an optimiser, so that a learner goes on listening."""

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()

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
            served = self.draw_live()
            rollouts = self.roll_out(queue, weights, self.config.rollouts - len(served))
            sampled = time.perf_counter()
            self.beat()
            experience = self.look_at(rollouts, served)
            figures = experience.figures | {"beta": self.control.beta, "rollouts_s": sampled - started}
            report.batches.append(figures)
            kept.append(weights)
            if figures["kl"] > config.kl_limit:
                report.stopped = f"the KL to the reference reached {figures['kl']:.2f} nats a reply"
                break
            if self.gains_nothing(report.batches):
                report.stopped = f"{config.patience} batches brought no reward worth its KL"
                break
            if number == config.batches:
                report.stopped = f"all {config.batches} batches were used"
                break
            figures |= self.learn_from(experience)
            self.control.update(figures["kl"])
            figures["steps_s"] = time.perf_counter() - sampled
            progress("ppo", len(report.batches) / config.batches, figures)
        progress("ppo", 1.0, report.batches[-1])  # the last batch was looked at, not learned from
        report.kept = self.choose(report.batches)
        self.policy.load(kept[report.kept])
        self.go_back(kept, report)
        return report

    def gains_nothing(self, batches: Sequence[dict[str, float]]) -> bool:
        """Whether it is no use to go on after these batches."""
        return idle(batches, self.config.kl_price) >= self.config.patience

    def choose(self, batches: Sequence[dict[str, float]]) -> int:
        """The batch whose policy is taken."""
        return best(batches, self.config.kl_price)

    def go_back(self, kept: Sequence[AdapterWeights], report: PolicyReport) -> None:
        """From weights beyond the KL limit, go back towards the last ones within it, as far as the budget asks."""
        outside = report.batches[report.kept]["kl"]
        if report.kept == 0 or outside <= self.config.kl_limit:
            return
        inside = report.batches[report.kept - 1]["kl"]
        share = (KL_AIM * self.config.kl_limit - inside) / (outside - inside)
        self.policy.load(blend(kept[report.kept - 1], kept[report.kept], min(max(share, 0.0), 1.0)))

    # experience

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

    def roll_out(self, queue: Iterator[Prompt], weights: AdapterWeights, count: int) -> list[Rollout]:
        """So many fresh replies to the next prompts, as many to each as the objective compares."""
        samples = self.objective.samples
        asked = itertools.islice(queue, max(count // samples, 1))
        prompts = [prompt for prompt in asked for _ in range(samples)]
        return self.sampler.sample(prompts, weights, self.random.getrandbits(32), self.config.temperature)

    @torch.no_grad()
    def look_at(self, fresh: Sequence[Rollout], served: Sequence[Rollout] = ()) -> Experience:
        """Score replies and work out what each token was worth. The figures are of the fresh ones alone."""
        config, rollouts, count = self.config, [*fresh, *served], len(fresh)
        batch = Batch.of(rollouts)
        mask_BT = batch.mask_BT
        number_BT = batch.spread(torch.arange(int(mask_BT.sum())))
        old_BT, base_BT, kl_BT = (torch.zeros(mask_BT.shape) for _ in range(3))
        hidden_NH = torch.zeros(int(mask_BT.sum()), self.model.width)
        states_BS = torch.zeros(len(rollouts), 2 * self.model.width)
        for rows, found in self.each(lambda _, part: self.model.compare(part, POLICY, config.temperature), batch):
            width = found.new_BT.shape[1]
            old_BT[rows, :width], base_BT[rows, :width], kl_BT[rows, :width] = found.new_BT, found.base_BT, found.kl_BT
            hidden_NH[number_BT[rows][mask_BT[rows]]] = found.hidden_NH
            states_BS[rows] = found.states_BS
        running = [one.clamp(-config.score_clip, config.score_clip) for one in self.reward.running(rollouts, states_BS)]
        scores_B = torch.stack([running_T[-1] for running_T in running])
        cut_B = torch.tensor([not rollout.ended for rollout in rollouts])
        repeated_B = torch.tensor([repetition(rollout.reply_ids) for rollout in rollouts])
        if self.live is not None:
            said_B = torch.tensor([0.0] * count + [self.live.said(one) for one in served])
            scores_B = (scores_B + config.live_trust * said_B).clamp(-config.score_clip, config.score_clip)
        penalised_B = scores_B - config.missing_eos_penalty * cut_B - config.repetition_penalty * repeated_B
        k1_BT = ppo.k1(old_BT, base_BT, mask_BT)
        divergence_BT = k1_BT + config.chi_share * ppo.chi2(k1_BT, config.chi_bound)
        rewards_BT = ppo.token_rewards(penalised_B, divergence_BT, mask_BT, self.control.beta)
        returns_BT = ppo.returns(rewards_BT, mask_BT, config.gamma)
        values_BT = torch.zeros(mask_BT.shape)
        if self.objective.critic:
            running_N1 = torch.cat([running_T[:-1] for running_T in running])[:, None]
            features_NF = torch.cat([hidden_NH, running_N1], 1)
            values_BT = batch.spread(crossfit_values(features_NF, returns_BT[mask_BT], mask_BT.nonzero()[:, 0]))
        advantages_BT = self.objective.advantages(rewards_BT, values_BT, mask_BT)
        figures = {
            "score": float(penalised_B[:count].mean()),
            "kl": float(kl_BT[:count].sum(1).mean()),
            "k1": float(k1_BT[:count].sum(1).mean()),
            "tokens": float(mask_BT[:count].sum(1).float().mean()),
            "ended": 1 - float(cut_B[:count].float().mean()),
            "repetition": float(repeated_B[:count].mean()),
            "explained_variance": ppo.explained_variance(values_BT[:count], returns_BT[:count], mask_BT[:count]),
        }
        advantages_BT = ppo.whiten(advantages_BT, mask_BT)
        if served:
            behaviour_BT = batch.spread(torch.tensor([p for one in rollouts for p in one.logprobs]))
            behaviour_BT[:count] = old_BT[:count]
            advantages_BT = advantages_BT * ppo.staleness_weight(old_BT, behaviour_BT, mask_BT, LARGEST_WEIGHT)
            figures["live"] = float(len(served))
        return Experience(batch, old_BT, rewards_BT, values_BT, advantages_BT, figures)

    # steps

    def minibatches(self, experience: Experience) -> Iterator[list[int]]:
        order = list(range(len(experience.old_BT)))
        self.random.shuffle(order)
        for start in range(0, len(order), self.config.minibatch):
            self.beat()
            yield order[start : start + self.config.minibatch]

    def learn_from(self, experience: Experience) -> dict[str, float]:
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
            gradients = torch.autograd.grad(loss, self.parameters)
            with torch.no_grad():
                moved = float(ppo.k3(old_BT, new_BT, part.mask_BT).sum()) / tokens
                ratio_BT = ppo.ratio(new_BT, old_BT, part.mask_BT)
                ratio = float(ppo.masked_sum(ratio_BT, part.mask_BT)) / tokens
                clipped = ppo.clip_share(ratio_BT, part.mask_BT, config.clip) * int(part.mask_BT.sum()) / tokens
            return gradients, moved, ratio, float(loss.detach()), clipped

        gradients, *sums = zip(*(found for _, found in self.each(work, batch, rows)), strict=True)
        moved, ratio, loss, clipped = map(sum, sums)
        self.step(gradients, skip=ratio > config.max_mean_ratio)
        return Step(moved, loss, clipped)

    def each(
        self, work: Callable[[list[int], Batch], T], batch: Batch, rows: Sequence[int] | None = None
    ) -> list[tuple[list[int], T]]:
        """What `work` makes of some rows (default: all) in groups of like length, which threads share; always in one order.

        On a CPU a thread with a group of its own wastes less than threads that share each product, most of all where
        another process is busy too.
        """
        rows = range(len(batch.lengths)) if rows is None else rows
        share = math.ceil(sum(batch.lengths[row] for row in rows) / self.threads)
        groups = _groups(batch, rows, min(self.config.micro_tokens, share))
        return list(self.pool.map(lambda group: (group, work(group, batch.rows(group))), groups))

    def step(self, gradients: Sequence[Sequence[Tensor]], *, skip: bool) -> None:
        """Add up the groups' gradients and step, unless told to skip or they are not finite."""
        for parameter, parts in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        if not skip and bool(torch.isfinite(norm)):
            self.optimiser.step()
            self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)


def best(batches: Sequence[dict[str, float]], kl_price: float) -> int:
    """The batch whose policy scored most, less the price of its KL.

    Once nearly every reply is liked, whitened advantages are mostly noise: the policy goes on moving, and only the KL grows.
    """
    return max(range(len(batches)), key=lambda number: batches[number]["score"] - kl_price * batches[number]["kl"])


def idle(batches: Sequence[dict[str, float]], kl_price: float) -> int:
    """Batches since one was worth clearly more than all before it, or since the policy began to move.

    So a lucky first batch is no reason to stop, and a little luck later none to go on.
    """
    peak, since = -math.inf, 0
    for number, batch in enumerate(batches):
        worth = batch["score"] - kl_price * batch["kl"]
        if worth > peak + MIN_GAIN:
            peak, since = worth, number
    moved = (n for n, batch in enumerate(batches) if abs(batch["kl"] - batches[0]["kl"]) > MOVED_KL)
    return len(batches) - 1 - max(since, next(moved, len(batches) - 1))


def blend(start: AdapterWeights, end: AdapterWeights, share: float) -> AdapterWeights:
    """The weights on the straight way from one adapter to another of the same shape."""
    tensors = {
        path: (torch.lerp(down, end.tensors[path][0], share), torch.lerp(up, end.tensors[path][1], share))
        for path, (down, up) in start.tensors.items()
    }
    return AdapterWeights(rank=start.rank, scaling=start.scaling, tensors=tensors)


def _groups(batch: Batch, rows: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows in groups of like length, of at most `max_tokens` padded tokens each."""
    for group in length_sorted([batch.lengths[row] for row in rows], max_tokens):
        yield [rows[index] for index in group]
