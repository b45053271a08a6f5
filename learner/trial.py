"""A trial of the learner in one process: simulated people judge the base's replies, one round learns from them, and what
comes of it is judged on prompts that got no feedback.

No server, no log: only `Trainer.learn` stands between the feedback and the candidate, which is judged whatever the gate says.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from feedback.raters import Rater, Taste, crowd, taste
from learner import corpus
from learner.config import LearnerConfig
from learner.direct import EXAMPLES
from learner.improve import Progress
from learner.judgement import Judgement, Sample
from learner.live import LiveReply
from learner.model import Batch, length_sorted
from learner.rollouts import Prompt, Rollout
from learner.steps import POLICY
from learner.trainer import Trainer
from serving.model import find_model

RATERS = 24
FRESH = 10
"""Replies to each prompt that judge a candidate."""
MOST_TURNS = 50
"""Exchanges for each judgement, after which nobody waits for more of them."""

Kind = Literal["thumb", "preference"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """A message of a person."""

    content: str
    role: str = "user"


@dataclass(frozen=True, slots=True)
class Halves:
    """What people say to the base model, as texts: what feedback is given on, and what is judged."""

    seen: list[str]
    unseen: list[str]

    @classmethod
    def of(cls, model: str | None) -> Halves:
        """From the `prompts.json` beside the model (None: the built-in one). Raises ModelError or OSError."""
        prompts = json.loads((Path(find_model(model)) / "prompts.json").read_text("utf-8"))
        return cls(prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :])


def run_cell(
    wanted: str,
    count: int,
    noise: float,
    seed: int,
    *,
    objective: str = "ppo",
    kind: Kind = "thumb",
    config: LearnerConfig | None = None,
    progress: Progress = lambda phase, fraction, batch=None: None,
) -> Json:
    """One run, from simulated feedback to a row of a table: `count` judgements of people who want the taste `wanted`.

    A share `noise` of the judgements is wrong. Seconds, of the clock and of the processor, are those of the round alone. Memory
    is the peak of the process above what it held when called: the run's own only where the process did nothing before.
    Raises ValueError for a taste or an objective that is not known.
    """
    before_mb, liked = memory_mb("VmRSS"), taste(wanted)
    config = LearnerConfig.model_validate({**dict(config or LearnerConfig()), "objective": objective, "seed": seed})
    trainer, halves = Trainer(config), Halves.of(config.serving.model)
    judgements = feedback(trainer, halves.seen, crowd(liked, RATERS, noise=noise, seed=seed), count, seed, kind)
    prompts = list(dict.fromkeys(one.reply.prompt_ids for one in judgements))
    started, worked = time.perf_counter(), time.process_time()
    live = served(trainer, judgements)
    candidate = trainer.learn(judgements, prompts, parent=None, seed=seed, served=live, progress=progress)
    took_s, cpu_s = time.perf_counter() - started, time.process_time() - worked
    peak_mb = memory_mb("VmHWM")
    asked = [encoded(trainer, text) for text in halves.unseen] * FRESH
    base, learned = (trainer.sampler.sample(asked, weights, seed) for weights in (None, candidate.weights))
    trainer.model.adapter(POLICY).load(candidate.weights)
    return {
        "taste": wanted, "kind": kind, "count": count, "noise": noise, "seed": seed, "objective": objective,
        "before": quality(texts(trainer, halves.unseen * FRESH, base), liked),
        "after": quality(texts(trainer, halves.unseen * FRESH, learned), liked),
        "kl": trainer.mean_kl(learned),
        "passed": candidate.gate.passed,
        "why": " ".join(check.sentence for check in candidate.gate.checks if check.verdict == "fail"),
        "seconds": took_s,
        "cpu_s": cpu_s,
        "live": candidate.report.get("live"),
        "phases_s": candidate.report["seconds"],
        "rollouts_per_s": None if objective in EXAMPLES else rollouts_per_s(candidate.report, config.rollouts),
        "memory_mb": None if before_mb is None or peak_mb is None else peak_mb - before_mb,
    }  # fmt: skip


def feedback(
    trainer: Trainer, prompts: Sequence[str], people: Sequence[Rater], count: int, seed: int, kind: Kind
) -> list[Judgement]:
    """`count` judgements of the base's own replies, people and prompts taking turns. Where two replies please alike, none."""
    judgements: list[Judgement] = []
    for turn, (text, replies) in enumerate(exchanges(trainer, prompts, 2 if kind == "preference" else 1, seed)):
        if len(judgements) == count:
            break
        if turn == MOST_TURNS * count:
            raise ValueError(f"of {turn} pairs only {len(judgements)} differ in what these people want")
        rater, said = people[turn % len(people)], [trainer.chat.decode(one.reply_ids) for one in replies]
        samples = [Sample(f"r{turn}:{n}", one.prompt_ids, one.reply_ids, 0) for n, one in enumerate(replies)]
        if kind == "preference":
            chosen = rater.prefer(text, *said)
            if chosen is not None:
                better, worse = samples[chosen], samples[1 - chosen]
                judgements.append(Judgement(f"f{turn}", kind, rater.user, 1.0, better, worse, float(turn)))
        else:
            up = float(bool(rater.thumb(text, said[0])))
            judgements.append(Judgement(f"f{turn}", kind, rater.user, up, samples[0], None, float(turn)))
    return judgements


def served(trainer: Trainer, judgements: Sequence[Judgement]) -> list[LiveReply]:
    """The judged replies as the base served them."""
    samples = [sample for one in judgements for sample in (one.reply, one.other) if sample is not None]
    batch = Batch.of(samples)
    said_BT = torch.zeros(batch.mask_BT.shape)
    with torch.no_grad():
        for rows in length_sorted(batch.lengths, trainer.ppo.micro_tokens):
            part = trainer.model.logprobs(batch.rows(rows), None)
            said_BT[rows, : part.shape[1]] = part
    return [
        LiveReply(
            one.prompt_ids,
            one.reply_ids,
            ended=one.reply_ids[-1] in trainer.chat.eos_ids,
            logprobs=tuple(said_T[mask_T].tolist()),
            behind=0,
            full_support=True,
        )
        for one, said_T, mask_T in zip(samples, said_BT, batch.mask_BT, strict=True)
    ]


def exchanges(
    trainer: Trainer, prompts: Sequence[str], replies: int, seed: int
) -> Iterator[tuple[str, Sequence[Rollout]]]:
    """Each prompt in turn with so many replies of the base, again and again."""
    seeds = random.Random(seed)
    while True:
        asked = [encoded(trainer, text) for text in prompts for _ in range(replies)]
        sampled = trainer.sampler.sample(asked, None, seeds.getrandbits(32))
        yield from ((text, sampled[n * replies : (n + 1) * replies]) for n, text in enumerate(prompts))


def encoded(trainer: Trainer, text: str) -> Prompt:
    """What somebody says first, as the model reads it."""
    return tuple(trainer.chat.encode([Said(text)]))


def texts(trainer: Trainer, prompts: Sequence[str], rollouts: Sequence[Rollout]) -> list[tuple[str, str]]:
    """Prompts with replies to them, as people read them."""
    return [(text, trainer.chat.decode(one.reply_ids)) for text, one in zip(prompts, rollouts, strict=True)]


def quality(said: Sequence[tuple[str, str]], liked: Taste) -> Json:
    """Of prompts with replies the shares satisfied, right in fact (where there is a fact), both, and well-formed."""
    judged = [(liked(prompt, reply), corpus.judge(prompt, reply)) for prompt, reply in said]
    facts = [(pleased, found.fact_right) for pleased, found in judged if found.fact_right is not None]
    return {
        "satisfied": statistics.fmean(pleased for pleased, _ in judged),
        "facts": statistics.fmean(right for _, right in facts) if facts else None,
        "both": statistics.fmean(right and pleased for pleased, right in facts) if facts else None,
        "well_formed": statistics.fmean(found.well_formed for _, found in judged),
    }


def rollouts_per_s(report: Json, rollouts: int) -> float | None:
    """Replies that were sampled, scored and trained on, per second of sampling and PPO; None where there were none."""
    if "policy" not in report:
        return None
    trained = sum("steps_s" in batch for batch in report["policy"]["batches"])
    seconds: float = report["seconds"]["rollouts"] + report["seconds"]["ppo"]
    return trained * rollouts / seconds


def memory_mb(name: str) -> float | None:
    """Of this process: `VmRSS` is what it holds, `VmHWM` the most it ever held; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text("ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)
