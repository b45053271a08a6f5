"""What a batch's policy is worth: the score of its replies, less the price of their KL to the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_GAIN = 0.05
"""Of a batch's worth, in standard deviations of the reference's score: less is chance."""
MOVED_KL = 0.1
"""Nats a reply from which on a policy counts as moved."""


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
