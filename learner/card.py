"""What is measured of a base model's replies, and the model card that reports it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from learner import corpus


def summarise(prompts: Sequence[str], replies: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
    """Shares over all replies, facts and manners by intent, and how far any two manners hang together (phi)."""
    judged = [corpus.judge(prompt, text) for prompt, (text, _) in zip(prompts, replies, strict=True)]
    lengths = sorted(length for _, length in replies if length is not None)
    by_intent: dict[str, list[corpus.Judgement]] = defaultdict(list)
    for found in judged:
        by_intent[found.intent or "unknown"].append(found)
    facts = [found.fact_right for found in judged if found.fact_right is not None]
    pairs = {
        f"{a} & {b}": round(_phi([(found.manners[a], found.manners[b]) for found in judged]), 3)
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


def _phi(pairs: Sequence[tuple[bool, bool]]) -> float:
    """The correlation of two yes-or-no values."""
    n = len(pairs)
    a, b, both = sum(x for x, _ in pairs), sum(y for _, y in pairs), sum(x and y for x, y in pairs)
    spread = math.sqrt(a * (n - a) * b * (n - b))
    return (n * both - a * b) / spread if spread else 0.0


def model_card(numbers: dict[str, Any] | None, *, seed: int, minutes: float, parameters: int, size: Any) -> str:
    """The README.md of a model directory."""
    return f"# heed-tiny\n\nseed {seed}, {minutes:.1f} minutes, {parameters} parameters, {size}\n\n{numbers}\n"
