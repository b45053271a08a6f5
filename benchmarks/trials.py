"""What every learner of benchmarks/learn.py is given, and the one judge of what it makes of it.

The prompts of the built-in corpus are dealt into five groups without overlap. Feedback is on `taught` ones alone. `fresh` are
other prompts of the same intents and phrasings, `paraphrased` ask for the same in phrasings without any feedback, `untaught`
are of intents without any; these are judged. `tuning` are like the fresh ones: learning rates are chosen by them.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from feedback.raters import crowd, taste
from learner import corpus, trial
from learner.grammar import as_pattern
from learner.judgement import Judgement, Sample
from learner.steps import POLICY
from learner.trainer import Trainer
from serving.peft_files import read_peft, read_peft_folder

POOL = 800
SIZES = {"taught": 100, "fresh": 60, "tuning": 40, "paraphrased": 40, "untaught": 40}
JUDGED = ("fresh", "paraphrased", "untaught")
UNTAUGHT_SHARE, PARAPHRASED_SHARE = 0.25, 0.3

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """Feedback that learners are compared on."""

    taste: str
    kind: trial.Kind
    count: int
    noise: float
    seed: int


@lru_cache(maxsize=1)
def groups() -> Mapping[str, list[str]]:
    """The prompts of each group; none of them is in the base's training text."""
    dealt: dict[str, list[str]] = defaultdict(list)
    names = sorted(corpus.intents())
    random.Random(0).shuffle(names)
    untaught = set(names[: round(UNTAUGHT_SHARE * len(names))])
    for prompt in corpus.heldout_prompts(POOL, seed=1):
        name = corpus.judge(prompt, "").intent
        assert name is not None, prompt
        intent = corpus.intents()[name]
        if name in untaught:
            dealt["untaught"].append(prompt)
        elif phrasing(prompt) >= (1 - PARAPHRASED_SHARE) * len(intent.asks):
            dealt["paraphrased"].append(prompt)
        else:
            dealt["taught"].append(prompt)
    places = itertools.accumulate([SIZES["taught"], SIZES["fresh"], SIZES["tuning"]], initial=0)
    parts = [dealt["taught"][start:end] for start, end in itertools.pairwise(places)]
    whole = dealt | dict(zip(("taught", "fresh", "tuning"), parts, strict=True))
    return {group: whole[group][:size] for group, size in SIZES.items()}


def phrasing(prompt: str) -> int:
    """Which of its intent's phrasings a prompt has: the longest that is found in it, as its first letter may be small."""
    name = corpus.judge(prompt, "").intent
    assert name is not None, prompt
    intent = corpus.intents()[name]
    found = [re.search(as_pattern(ask, intent.rows).pattern, prompt, re.IGNORECASE) for ask in intent.asks]
    return max(range(len(found)), key=lambda number: len(match[0]) if (match := found[number]) else -1)


class Judge:
    """The base with its engine: makes the replies that feedback is on, and those that an adapter is judged by."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def feedback(self, cell: Cell) -> Json:
        """The cell's feedback as thumbs and as pairs, since peers take one of them: one was given, the other made of it."""
        people = crowd(cell.taste, trial.RATERS, noise=cell.noise, seed=cell.seed)
        given = trial.feedback(self.trainer, groups()["taught"], people, cell.count, cell.seed, cell.kind)
        rows = [self.row(judgement) for judgement in given]
        if cell.kind == "thumb":
            return {"thumbs": rows, "pairs": pairs_of(rows)}
        return {"thumbs": thumbs_of(rows), "pairs": rows}

    def row(self, judgement: Judgement) -> Json:
        """A judgement with its texts, as JSON takes it."""
        ids = judgement.reply.prompt_ids
        row: Json = {"prompt": self.prompts()[ids], "prompt_ids": ids, "user": judgement.user}
        if judgement.other is None:
            return row | self.said("reply", judgement.reply) | {"label": bool(judgement.value)}
        return row | self.said("chosen", judgement.reply) | self.said("rejected", judgement.other)

    def said(self, name: str, sample: Sample) -> Json:
        return {name: self.trainer.chat.decode(sample.reply_ids), f"{name}_ids": sample.reply_ids}

    def prompts(self) -> dict[tuple[int, ...], str]:
        """The taught prompts by their ids."""
        return {trial.encoded(self.trainer, prompt): prompt for prompt in groups()["taught"]}

    def judge(self, adapter: Path, name: str, group: str, seed: int) -> Json:
        """What people of this taste would think of ten fresh replies to a group's prompts; its KL to the base in nats."""
        trainer, prompts = self.trainer, groups()[group] * trial.FRESH
        weights = read_peft(adapter.name, *read_peft_folder(adapter.name, adapter), trainer.base)
        trainer.model.adapter(POLICY).load(weights)
        replies = trainer.sampler.sample([trial.encoded(trainer, prompt) for prompt in prompts], weights, seed)
        found = trial.quality(trial.texts(trainer, prompts, replies), taste(name))
        return with_product(found, prompts) | {
            "kl": trainer.mean_kl(replies),
            "tokens": statistics.fmean(len(reply.reply_ids) for reply in replies),
        }


def with_product(found: Json, prompts: Sequence[str]) -> Json:
    """With satisfied × facts and its standard error: that of a product of two independent shares, to first order."""
    facts = sum(corpus.judge(prompt, "").fact_right is not None for prompt in prompts)
    s, f = found["satisfied"], found["facts"]
    variance = f**2 * s * (1 - s) / len(prompts) + s**2 * f * (1 - f) / facts
    return found | {"replies": len(prompts), "product": s * f, "error": math.sqrt(variance)}


def pairs_of(thumbs: Sequence[Json]) -> list[Json]:
    """A disliked reply beside each liked one: to the same prompt, or else to one of the same intent.

    Where an intent has none of either kind nothing can be said of it.
    """
    disliked: dict[str | None, list[Json]] = defaultdict(list)
    for thumb in thumbs:
        if not thumb["label"]:
            disliked[thumb["prompt"]].append(thumb)
            disliked[corpus.judge(thumb["prompt"], "").intent].append(thumb)
    pairs = []
    for number, thumb in enumerate(thumbs):
        others = disliked[thumb["prompt"]] or disliked[corpus.judge(thumb["prompt"], "").intent]
        if thumb["label"] and others:
            other = others[number % len(others)]
            rejected = {"rejected": other["reply"], "rejected_ids": other["reply_ids"]}
            chosen = {"chosen": thumb["reply"], "chosen_ids": thumb["reply_ids"]}
            pairs.append({key: thumb[key] for key in ("prompt", "prompt_ids", "user")} | chosen | rejected)
    return pairs


def thumbs_of(pairs: Sequence[Json]) -> list[Json]:
    """A thumb up for what was chosen, one down for what was not."""
    return [
        {key: pair[key] for key in ("prompt", "prompt_ids", "user")}
        | {"reply": pair[side], "reply_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
