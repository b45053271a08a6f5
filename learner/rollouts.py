"""Fresh replies of a policy to logged prompts, and what can be said of them without a model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from serving.engine import Engine, Request
from serving.lora import AdapterWeights
from serving.sampling import Sampling

Prompt = tuple[int, ...]
LATEST = 1
"""What the engine calls the newest weights: each batch writes over those of the batch before."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A reply sampled with nothing cut off, so that it is a fair draw of its policy at one temperature."""

    prompt_ids: Prompt
    reply_ids: tuple[int, ...]
    """With the end-of-sequence id, where one was sampled."""
    ended: bool
    """False when it was cut at the limit."""
    logprobs: tuple[float, ...]
    """log p of each token at T=1, by the engine that sampled it."""


class Sampler:
    """Draws rollouts of any adapter from an engine that nobody else uses."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self.engine = engine
        self.max_tokens = max_tokens

    def sample(
        self, prompts: Sequence[Prompt], weights: AdapterWeights | None, seed: int, temperature: float = 1.0
    ) -> list[Rollout]:
        """One reply to each prompt, in order, by the base with these weights (None: the base itself).

        Only at temperature 1 are they fair draws.
        """
        seeds = random.Random(seed)
        if weights is not None:
            self.engine.restage(LATEST, weights)
        version = 0 if weights is None else LATEST
        finished = self.engine.generate(
            [
                Request(prompt, Sampling(temperature, max_tokens=self.max_tokens, seed=seeds.getrandbits(48)), version)
                for prompt in prompts
            ]
        )
        errors = [reply.error for reply in finished if reply.reason in ("abort", "error")]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(finished)} rollouts broke off; the first: {errors[0]}")
        return [Rollout(f.prompt_ids, f.reply_ids, f.reason == "stop", f.raw_logprobs) for f in finished]


def shuffled(prompts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """The prompts in random order, again and again, each round in another order."""
    order = random.Random(seed)
    while True:
        yield from order.sample(prompts, len(prompts))


@dataclass(frozen=True, slots=True)
class Shape:
    """The outer form of a set of replies."""

    tokens: float
    """Mean length."""
    ended: float
    """Share that ended by themselves."""
    repetition: float
    """Share of 4-grams that stood in the same reply before."""
    nll: float
    """Mean −log p of a token by the policy that said it: an estimate of its entropy, in nats."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Shape:
        return cls(
            tokens=fmean(len(rollout.reply_ids) for rollout in rollouts),
            ended=fmean(rollout.ended for rollout in rollouts),
            repetition=fmean(repetition(rollout.reply_ids) for rollout in rollouts),
            nll=-sum(sum(r.logprobs) for r in rollouts) / sum(len(r.logprobs) for r in rollouts),
        )


def repetition(reply_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a reply that occurred in it before; 0 when it is shorter than that."""
    grams = Counter(tuple(reply_ids[i : i + n]) for i in range(len(reply_ids) - n + 1))
    total = grams.total()
    return 1 - len(grams) / total if total else 0.0
