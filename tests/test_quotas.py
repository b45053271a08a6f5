"""Buckets of this process, against the definition: tokens that are counted and poured."""

from __future__ import annotations

import random

import pytest

from feedback import quotas
from feedback.quotas import Buckets


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_it_gives_what_a_bucket_of_tokens_would() -> None:
    dice, clock = random.Random(1), Clock()
    buckets, tokens = Buckets(clock), 30.0
    granted = []
    for _ in range(2000):
        passed = dice.expovariate(0.6)
        clock.now += passed
        tokens = min(30.0, tokens + passed * 30 / 60)
        wait = buckets.take("ann", 30)
        granted.append(wait == 0.0)
        if tokens >= 1 - 1e-6:
            assert wait == 0.0
            tokens -= 1
        else:
            assert wait == pytest.approx((1 - tokens) * 60 / 30, abs=1e-6)
    assert 0.7 < sum(granted) / len(granted) < 0.95  # so that both were tried


def test_who_waits_as_long_as_was_said_is_granted() -> None:
    clock = Clock()
    buckets = Buckets(clock)
    assert [buckets.take("ann", 7) for _ in range(7)] == [0.0] * 7
    clock.now += buckets.take("ann", 7)
    assert buckets.take("ann", 7) == 0.0
    assert buckets.take("ann", 7) > 8


def test_callers_have_buckets_of_their_own() -> None:
    buckets = Buckets(Clock())
    assert [buckets.take(caller, 1) for caller in ("ann", "bob", "ann")] == [0.0, 0.0, 60.0]


def test_another_quota_holds_at_once() -> None:
    clock = Clock()
    buckets = Buckets(clock)
    for _ in range(60):
        buckets.take("ann", 60)
    assert buckets.take("ann", 60) == pytest.approx(1.0)
    assert buckets.take("ann", 6) == pytest.approx(10.0)


def test_who_came_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MOST", 3)
    buckets = Buckets(Clock())
    for caller in ("ann", "bob", "cid", "ann", "dan"):
        buckets.take(caller, 1)
    assert buckets.take("ann", 1) == 60.0
    assert buckets.take("bob", 1) == 0.0  # a bucket that nobody remembers is full
