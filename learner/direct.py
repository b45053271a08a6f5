"""Straight from judged replies, without a reward model: KTO, DPO, and SFT on what was liked. Baselines beside PPO.

They move the same adapter away from the same reference, and fresh replies after each batch say how far: the KL limit ends the
update as it ends PPO's, beyond which it goes back. Axes: B replies; h is log π − log π_ref summed over a reply.

References: KTO (2402.01306), DPO (2305.18290).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from learner.crossfit import RewardConfig
from learner.evidence import weigh
from learner.experience import Experience, Scorer
from learner.improve import Improver
from learner.judgement import LIKED, Judgement, Tokens
from learner.model import Batch, LearnerModel
from learner.recipe import PPOConfig
from learner.rollouts import Sampler
from learner.steps import POLICY

PASSES = 4
"""Over the feedback, at most."""
BETA = 0.1
"""Of KTO and DPO: both papers' price of leaving the reference."""


@dataclass(frozen=True, slots=True)
class Pasted:
    """The prompt of one exchange with the reply of another."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """What one step learns from: a reply that was liked, or not, or one of each to the same prompt."""

    liked: Tokens | None
    disliked: Tokens | None
    weight: float
    """As the reward model weighs the judgement, so that no rater has more than their share here either."""

    @property
    def reply(self) -> Tokens:
        """The only reply, or the liked one."""
        said = self.liked or self.disliked
        assert said is not None
        return said


def opinions(judgements: Sequence[Judgement]) -> list[Example]:
    """Each reply with whether it was liked; of two that were compared the better one was, the other not (of a ranking: of the
    best two)."""
    found: list[Example] = []
    for one, weight in zip(judgements, weigh(judgements, RewardConfig()), strict=True):
        if one.kind == "signal":  # what somebody did is no opinion
            continue
        liked = one.other is not None or one.value >= (LIKED if one.kind == "rating" else 1)
        found.append(Example(one.reply, None, weight) if liked else Example(None, one.reply, weight))
        if one.other is not None:
            found.append(Example(None, one.other, weight))
    return found


def balanced(judgements: Sequence[Judgement]) -> list[Example]:
    """The opinions, weighed such that good and bad ones count alike where there are both (2402.01306, section 4.2)."""
    found = opinions(judgements)
    total = {good: sum(one.weight for one in found if (one.liked is not None) == good) for good in (True, False)}
    return [replace(one, weight=one.weight / total[one.liked is not None] * len(found)) for one in found]


def liked(judgements: Sequence[Judgement]) -> list[Example]:
    """The opinions that are good ones."""
    return [one for one in opinions(judgements) if one.liked is not None]


def pairs(judgements: Sequence[Judgement]) -> list[Example]:
    """The preferences, and of thumbs and ratings each liked reply with a disliked one to the same prompt; none is left out."""
    weights = weigh(judgements, RewardConfig())
    found = [
        Example(one.reply, one.other, weight) for one, weight in zip(judgements, weights, strict=True) if one.other
    ]
    by_prompt: defaultdict[tuple[int, ...], tuple[list[Example], list[Example]]] = defaultdict(lambda: ([], []))
    for one in opinions([one for one in judgements if one.other is None]):
        by_prompt[one.reply.prompt_ids][one.liked is None].append(one)
    for good, bad in by_prompt.values():
        turns = range(max(len(good), len(bad)) if good and bad else 0)
        for one, other in ((good[turn % len(good)], bad[turn % len(bad)]) for turn in turns):
            found.append(Example(one.liked, other.disliked, min(one.weight, other.weight)))
    return found


def dpo_loss(liked_B: Tensor, disliked_B: Tensor, weight_B: Tensor, beta: float = BETA) -> Tensor:
    """−log σ(β(h_liked − h_disliked)), the weighted mean over pairs (2305.18290, eq. 7)."""
    return -(weight_B * functional.logsigmoid(beta * (liked_B - disliked_B))).sum() / weight_B.sum()


def kto_loss(ratio_B: Tensor, liked_B: Tensor, pasted_B: Tensor, weight_B: Tensor, beta: float = BETA) -> Tensor:
    """1 − σ(β(h − z)) for a liked reply, 1 − σ(β(z − h)) for another; the weighted mean (2402.01306, eq. 8).

    z is the KL to the reference, by replies pasted to other prompts; at least 0 (and 0 where there are none), and no gradient
    goes through it. `ratio_B` is h, `pasted_B` the same of the pasted ones, however many, `liked_B` True or False.
    """
    zero = pasted_B.detach().sum().clamp_min(0) / max(len(pasted_B), 1)
    gain_B = torch.where(liked_B, ratio_B - zero, zero - ratio_B)
    return (weight_B * (1 - torch.sigmoid(beta * gain_B))).sum() / weight_B.sum()


def sft_loss(ratio_B: Tensor, tokens_B: Tensor, weight_B: Tensor) -> Tensor:
    """−Σ log π ÷ tokens, replies weighted; but for the reference's share in h, which is constant."""
    return -(weight_B * ratio_B).sum() / (weight_B * tokens_B).sum()


def rows_of(name: str, examples: Sequence[Example], max_len: int) -> list[Tokens]:
    """The replies whose h a step's loss asks for. Of pasted ones those of up to `max_len` tokens, prompt included."""
    rows = [one.reply for one in examples]
    if name == "dpo":
        return [*rows, *(one.disliked for one in examples if one.disliked is not None)]
    if name == "kto":
        others = itertools.islice(itertools.cycle(rows), 1, len(rows) + 1)
        pasted = [Pasted(one.prompt_ids, other.reply_ids) for one, other in zip(rows, others, strict=False)]
        return [*rows, *(one for one in pasted if len(one.prompt_ids) + len(one.reply_ids) <= max_len)]
    return rows


def loss_of(name: str, ratio_B: Tensor, examples: Sequence[Example]) -> Tensor:
    """The loss of these examples from the h of their rows."""
    weight_B = torch.tensor([one.weight for one in examples])
    first_B, second_B = ratio_B[: len(examples)], ratio_B[len(examples) :]
    if name == "dpo":
        return dpo_loss(first_B, second_B, weight_B)
    if name == "kto":
        return kto_loss(first_B, torch.tensor([one.liked is not None for one in examples]), second_B, weight_B)
    return sft_loss(first_B, torch.tensor([float(len(one.reply.reply_ids)) for one in examples]), weight_B)


EXAMPLES: Mapping[str, Callable[[Sequence[Judgement]], list[Example]]] = {"kto": balanced, "dpo": pairs, "sft": liked}
"""The objectives by name, and what they learn from."""


class Direct(Improver):
    """An update whose batches are judged replies; its rollouts only show where the policy is."""

    def __init__(
        self,
        model: LearnerModel,
        reward: Scorer,
        sampler: Sampler,
        config: PPOConfig,
        seed: int,
        judgements: Sequence[Judgement],
    ) -> None:
        """`reward` is asked for the report alone: nothing is learned from its scores, nor chosen by them."""
        self.name, self.examples = config.objective, EXAMPLES[config.objective](judgements)
        batches = min(config.batches, math.ceil(PASSES * max(len(self.examples), 1) / config.rollouts))
        super().__init__(model, reward, sampler, replace(config, objective="reinforce", batches=batches), seed)
        self.queue = self.rounds()

    def gains_nothing(self, batches: Sequence[dict[str, float]]) -> bool:  # noqa: ARG002 (no score is trusted to say so)
        return False

    def choose(self, batches: Sequence[dict[str, float]]) -> int:
        return len(batches) - 1

    def rounds(self) -> Iterator[Example]:
        """All examples in random order, again and again, each round in another order."""
        while self.examples:
            yield from self.random.sample(self.examples, len(self.examples))

    def learn_from(self, experience: Experience) -> dict[str, float]:  # noqa: ARG002 (the feedback is the experience)
        """Steps on as many judged replies as a batch has rollouts."""
        batch = list(itertools.islice(self.queue, self.config.rollouts))
        steps = range(0, len(batch), self.config.minibatch)
        losses = [self.feedback_step(batch[start : start + self.config.minibatch]) for start in steps]
        return {"loss": statistics.fmean(losses)} if losses else {}

    def feedback_step(self, examples: Sequence[Example]) -> float:
        """One step; returns the loss before it. The loss depends on the policy through each row's h alone.

        So its gradient is that of Σ ∂loss/∂h · log π, which adds up over any micro-batches, though pairs may lie in two of them.
        """
        self.beat()
        batch = Batch.of(rows_of(self.name, examples, self.collector.sampler.engine.max_len))
        ratio_B = self.log_ratios(batch).requires_grad_()
        loss = loss_of(self.name, ratio_B, examples)
        (pull_B,) = torch.autograd.grad(loss, ratio_B)

        def work(micro: list[int], part: Batch) -> Sequence[Tensor]:
            said_B = self.model.logprobs(part, POLICY).sum(1)
            return torch.autograd.grad((pull_B[micro] * said_B).sum(), self.steps.parameters)

        found = self.steps.each(work, batch, [row for row, pull in enumerate(pull_B.tolist()) if pull])
        if found:
            self.steps.step([gradients for _, gradients in found], skip=False)
        return loss.item()

    @torch.no_grad()
    def log_ratios(self, batch: Batch) -> Tensor:
        """h of each row, [B]."""
        ratio_B = torch.zeros(len(batch.lengths))
        for rows, found_B in self.steps.each(lambda _, part: self.log_ratio(part), batch):
            ratio_B[rows] = found_B
        return ratio_B

    @torch.no_grad()
    def log_ratio(self, part: Batch) -> Tensor:
        """h of the rows of one group, [B]."""
        return (self.model.logprobs(part, POLICY) - self.model.logprobs(part, None)).sum(1)
