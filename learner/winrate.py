"""How often the candidate's reply is the better one, by a judge that asked half of the people: a figure of the report.

No check of the gate: benchmarks/LOG.md has what it said of candidates trained on nothing but chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from learner.crossfit import deal
from learner.reward import RewardModel

if TYPE_CHECKING:
    from learner.judgement import Judgement, Tokens

SURE = 1.96


def win_rate(
    reward: RewardModel,
    judgements: Sequence[Judgement],
    reference: Sequence[Tokens],
    replies: tuple[Sequence[Tokens], Sequence[Tokens]],
    penalty: float,
    seed: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """Share of prompts at which the first of `replies` scores more than the second, and a lower bound (95%, over prompts).

    The judge is a reward model like `reward`, fitted to half of the judgements: whole raters, or whole prompts. With two members
    and the `penalty` that proved best already it takes a part of the time.
    """
    fold_J, _ = deal(judgements, 2, seed)
    half = [judgement for judgement, fold in zip(judgements, fold_J, strict=True) if fold] or judgements
    config = replace(reward.config, folds=2, penalties=(penalty,))
    judge = RewardModel(reward.embeddings_VH, reward.eos_ids, config, reward.states)
    judge.fit(half, reference, seed, progress)
    won_B = ((judge.score(replies[0]) - judge.score(replies[1])).sign() + 1) / 2
    share = float(won_B.mean())
    return {"win_rate": share, "win_rate_lower": share - SURE * float(won_B.std()) / math.sqrt(len(won_B))}
