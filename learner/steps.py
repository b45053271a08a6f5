"""Optimiser steps on the policy's adapter, by gradients of groups of rows that threads share.

Axes: B replies, T positions of a padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from learner.model import Batch, LearnerModel, length_sorted
from learner.recipe import PPOConfig

T = TypeVar("T")
POLICY = "policy"


class Steps:
    """The optimiser of one update, and the threads that work for it."""

    def __init__(self, model: LearnerModel, config: PPOConfig) -> None:
        self.config = config
        self.parameters = list(model.adapter(POLICY).parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimiser, lambda done: min(1.0, (done + 1) / config.warmup_steps))
        self.threads = torch.get_num_threads() if model.base.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()

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
        learning = torch.is_grad_enabled()  # what a thread of the pool does not inherit

        def at_work(group: list[int]) -> tuple[list[int], T]:
            with torch.set_grad_enabled(learning):
                return group, work(group, batch.rows(group))

        return list(self.pool.map(at_work, groups))

    def step(self, gradients: Sequence[Sequence[Tensor]], *, skip: bool) -> None:
        """Add up the groups' gradients and step, unless told to skip or they are not finite."""
        for parameter, parts in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        if not skip and bool(torch.isfinite(norm)):
            self.optimiser.step()
            self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)


def _groups(batch: Batch, rows: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows in groups of like length, of at most `max_tokens` padded tokens each."""
    for group in length_sorted([batch.lengths[row] for row in rows], max_tokens):
        yield [rows[index] for index in group]
