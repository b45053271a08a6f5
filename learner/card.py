"""What is measured of a base model's replies, and the model card that reports it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learner import corpus


def measure(model_dir: Path, *, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What the card reports, from `samples` replies (T=1, full softmax) to the messages of `prompts.json` in turn."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    prompts = json.loads((model_dir / "prompts.json").read_text("utf-8"))
    asked = [prompts[number % len(prompts)] for number in range(samples)]
    return summarise(asked, replies(model, tokenizer, asked, seed=seed))


@torch.inference_mode()
def replies(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int = 0, limit: int = 80
) -> list[tuple[str, int | None]]:
    """One full-softmax sample (T=1) to each prompt, and its length in tokens, None if it had not ended at `limit`."""
    end = tokenizer.eos_token_id
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    found: list[tuple[str, int | None]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), 250):
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 250]]
            batch = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            out_BT = model.generate(**batch, generation_config=sampling)[:, batch["input_ids"].shape[1] :]
            for row in out_BT.tolist():
                length = row.index(end) + 1 if end in row else None
                found.append((tokenizer.decode(row[: length - 1] if length else row), length))
    return found


def summarise(prompts: Sequence[str], replies: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
    """Shares over all replies, facts and manners by intent, and how far any two manners hang together (phi)."""
    judged = [corpus.judge(prompt, text) for prompt, (text, _) in zip(prompts, replies, strict=True)]
    lengths = sorted(length for _, length in replies if length is not None)
    by_intent: dict[str, list[corpus.Judgement]] = defaultdict(list)
    for found in judged:
        by_intent[found.intent or "unknown"].append(found)
    facts = [found.fact_right for found in judged if found.fact_right is not None]
    pairs = {
        f"{a} & {b}": round(phi([(found.manners[a], found.manners[b]) for found in judged]), 3)
        for a, b in combinations(corpus.MANNERS, 2)
    }
    return {
        "samples": len(replies),
        "well_formed": _share([found.well_formed for found in judged]),
        "ended_within_80": len(lengths) / len(replies),
        "tokens_mean": sum(lengths) / max(1, len(lengths)),
        "tokens_p999": lengths[int(0.999 * (len(lengths) - 1))] if lengths else None,
        "facts_right": _share(facts),
        "manners": {manner: _share([found.manners[manner] for found in judged]) for manner in corpus.MANNERS},
        "largest_correlation": max(pairs.items(), key=lambda pair: abs(pair[1])),
        "correlations": pairs,
        "well_formed_by_intent": {
            name: _share([found.well_formed for found in each]) for name, each in sorted(by_intent.items())
        },
        "facts_by_intent": {
            name: _share([found.fact_right for found in each if found.fact_right is not None])
            for name, each in sorted(by_intent.items())
            if any(found.fact_right is not None for found in each)
        },
    }


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


def phi(pairs: Sequence[tuple[bool, bool]]) -> float:
    """The correlation of two yes-or-no values."""
    n = len(pairs)
    a, b, both = sum(x for x, _ in pairs), sum(y for _, y in pairs), sum(x and y for x, y in pairs)
    spread = math.sqrt(a * (n - a) * b * (n - b))
    return (n * both - a * b) / spread if spread else 0.0


def model_card(
    numbers: dict[str, Any] | None,
    *,
    seed: int,
    minutes: float,
    parameters: int,
    steps: int,
    threads: int,
    sharpness: float,
    source: str,
) -> str:
    """The README.md of a model directory; without `numbers` it says only how the model was made."""
    text = f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# heed-tiny

A small chat model to learn with: a Llama of {parameters / 1e6:.1f} million parameters (fp32) and a byte-level BPE
tokenizer with a chat template, both made from scratch on a CPU. It is fluent in a small world, sometimes wrong in
facts, and undecided in manner, so that feedback has something to steer. It is no general assistant: outside its
intents it answers with the nearest thing it knows. Licence: Apache-2.0, data included.

Made by `python -m learner.pretrain --out DIR --seed {seed} --steps {steps}`: {steps} steps of Muon and AdamW on
{source}, {minutes:.0f} minutes with {threads} threads. The same seed, steps and
threads give the same bytes on the same kind of processor. When training is done, the last norm is scaled by
{sharpness}: sampling at temperature 1 is then as sampling the trained model at {1 / sharpness:.2f}, which keeps the
full softmax from straying into tokens that never fit.
"""
    return text if numbers is None else text + _numbers(numbers)


def _numbers(numbers: dict[str, Any]) -> str:
    pair, phi = numbers["largest_correlation"]
    rows = [
        ("well-formed by the corpus's own grammar", f"{numbers['well_formed']:.1%}"),
        ("ended within 80 tokens", f"{numbers['ended_within_80']:.1%}"),
        ("tokens a reply: mean, 99.9th percentile", f"{numbers['tokens_mean']:.1f}, {numbers['tokens_p999']}"),
        ("facts right, where there is one", f"{numbers['facts_right']:.1%}"),
        ("largest correlation of two manners", f"{phi:+.3f} ({pair})"),
    ]
    manners = [(manner, f"{share:.1%}") for manner, share in numbers["manners"].items()]
    facts = [(name, f"{share:.1%}") for name, share in numbers["facts_by_intent"].items()]
    return f"""
## Measured

On {numbers["samples"]} replies sampled from the full softmax at temperature 1 to the 200 messages of `prompts.json`,
none of which the training text holds; `python -m learner.pretrain --measure --out DIR` measures again.

{_table("what", rows)}
## Manners

How often replies show each, by the rules of `feedback.manners`. Each varies within every intent, nearly
independent of the prompt and of the others.

{_table("manner", manners)}
## Facts right, by intent

The corpus itself tells about one fact in seventeen wrong.

{_table("intent", facts)}"""


def _table(head: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([f"| {head} | share |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n"
