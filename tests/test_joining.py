"""The state depends on what happened, not on how it was read: any interleaving, any batches, copies, kills, late exchanges."""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.events import Exchange, Feedback, Retraction
from feedback.log import Record
from learner.report import dropped, feedback_counts
from learner.state import State
from tests.told import BASE, NOW, POLICY, exchange, feedback, records, retraction

Event = Exchange | Feedback | Retraction | str


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    yield state
    state.close()


def in_partition(number: int, *events: Event, first: int = 1) -> list[Record]:
    """The events as records of this partition of their topics."""
    told = records(*events, first=first)
    return [Record(r.topic, f"{r.topic}/{number}", r.offset, r.key, r.event) for r in told]


def statuses(state: State) -> dict[str, tuple[str, str | None]]:
    rows = state.db.execute("SELECT id, status, reason FROM feedback")
    return {feedback_id: (status, reason) for feedback_id, status, reason in rows}


def story(state: State, feedback_id: str) -> list[str]:
    rows = state.db.execute("SELECT status FROM stories WHERE feedback_id = ? ORDER BY rowid", (feedback_id,))
    return [status for (status,) in rows]


def test_in_one_partition_the_last_opinion_counts_whatever_the_clocks_say(state: State):
    events = (exchange("r"), feedback("first", "r", at=NOW + 5), feedback("second", "r", at=NOW))
    state.absorb(in_partition(3, *events), NOW)
    assert statuses(state) == {"first": ("superseded", "by second"), "second": ("joined", None)}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("places", [(1, 2), (2, 1)])
def test_between_partitions_the_opinion_that_was_given_last_counts(state: State, order: int, places: tuple[int, int]):
    state.absorb(in_partition(0, exchange("r")), NOW)
    opinions = feedback("old", "r", at=NOW), feedback("new", "r", at=NOW + 5)
    old, new = (in_partition(place, opinion) for place, opinion in zip(places, opinions, strict=True))
    for records_ in (old, new)[::order]:
        state.absorb(records_, NOW)
    assert statuses(state) == {"old": ("superseded", "by new"), "new": ("joined", None)}


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_bodies_in_two_partitions_the_earliest_wins_and_the_other_is_a_conflict(state: State, order: int):
    early, late = feedback("f", "r", value=0, at=NOW), feedback("f", "q", value=1, at=NOW + 1)
    state.absorb(in_partition(0, exchange("r"), exchange("q")), NOW)
    for records_ in (in_partition(1, early), in_partition(2, late, late))[::order]:
        state.absorb(records_, NOW)
    [judgement] = state.judgements()
    assert (judgement.reply.reply_id, judgement.value) == ("r", 0.0)
    assert dropped(state) == {"conflict": 2}
    assert feedback_counts(state)["duplicates"] == 0


def test_what_a_conflict_s_loser_had_superseded_counts_again(state: State):
    state.absorb(in_partition(0, exchange("r"), exchange("q")), NOW)
    state.absorb(in_partition(1, feedback("mine", "r", at=NOW), feedback("f", "r", value=0, at=NOW + 2)), NOW + 2)
    assert statuses(state)["mine"] == ("superseded", "by f")
    state.absorb(in_partition(2, feedback("f", "q", value=1, at=NOW + 1)), NOW + 3)
    assert statuses(state) == {"mine": ("joined", None), "f": ("joined", None)}
    assert [judgement.reply.reply_id for judgement in state.judgements()] == ["r", "q"]
    assert story(state, "mine") == ["joined"]


def test_a_copy_at_a_later_offset_is_a_duplicate_and_takes_nothing_back(state: State):
    first, second = feedback("first", "r", value=1), feedback("second", "r", value=0, at=NOW + 1)
    state.absorb(in_partition(1, exchange("r"), first, second, first, retraction("second"), second), NOW)
    state.absorb(in_partition(0, exchange("r"), first, retraction("second")), NOW)
    assert statuses(state) == {"first": ("superseded", "by second"), "second": ("retracted", None)}
    assert feedback_counts(state)["duplicates"] == 3


def test_a_copy_that_goes_before_what_was_learned_from_is_learned_from_already(state: State):
    state.absorb(in_partition(2, exchange("r"), feedback("f", "r")), NOW)
    with state.transaction() as db:
        db.execute("UPDATE feedback SET learned_in = 1")
    state.absorb(in_partition(1, feedback("f", "r")), NOW)
    assert (state.judgement_count(fresh=False), state.judgement_count(fresh=True)) == (1, 0)


def test_a_late_exchange_joins_the_feedback_that_was_given_up(state: State):
    state.absorb(in_partition(1, feedback("f", "r", at=NOW - 100)), NOW)
    state.give_up_waiting(NOW - 50, NOW)
    assert dropped(state) == {"no_exchange": 1}
    state.absorb(in_partition(1, exchange("r", at=NOW - 200)), NOW + 10)
    assert statuses(state) == {"f": ("joined", None)}
    assert (dropped(state), feedback_counts(state)["late"]) == ({}, 1)
    assert story(state, "f") == ["joined"]


def test_a_late_exchange_leaves_the_same_state_as_one_in_time(tmp_path: Path):
    said, spoken = in_partition(1, feedback("f", "r", at=NOW - 100)), in_partition(1, exchange("r", at=NOW - 200))
    states = [State(tmp_path / f"{name}.db", policy=POLICY, base=BASE) for name in ("late", "in time")]
    states[0].absorb(said, NOW)
    states[0].give_up_waiting(NOW, NOW)
    states[0].absorb(spoken, NOW)
    states[1].absorb([*spoken, *said], NOW)
    assert states[0].digest() == states[1].digest()
    assert [state.counted() for state in states] == [{"late": 1}, {}]
    for state in states:
        state.close()


@pytest.mark.parametrize("then", ["superseded", "retracted"])
def test_what_was_given_up_may_still_be_superseded_or_retracted(state: State, then: str):
    state.absorb(in_partition(1, feedback("f", "r", at=NOW - 100)), NOW)
    state.give_up_waiting(NOW, NOW)
    news = {"superseded": feedback("g", "r", at=NOW), "retracted": retraction("f")}[then]
    state.absorb(in_partition(1, news, exchange("r"), first=2), NOW)
    assert statuses(state)["f"][0] == then
    assert dropped(state) == {}


def test_another_policy_s_exchanges_and_feedback_teach_this_one_nothing(tmp_path: Path):
    """Two policies share the topics; each learner keeps a state of its own, and learns from its own."""
    shared = in_partition(
        0,
        exchange("mine", policy="mine", prompt_ids=(1,)),
        exchange("theirs", policy="theirs", prompt_ids=(2,)),
        feedback("f", "mine"),
        feedback("g", "theirs"),
        feedback("both", "mine", "theirs", kind="preference"),
    )
    for policy, prompt, judged in (("mine", (1,), "f"), ("theirs", (2,), "g")):
        state = State(tmp_path / f"{policy}.db", policy=policy, base=BASE)
        state.absorb(shared, NOW)
        assert [judgement.feedback_id for judgement in state.judgements()] == [judged]
        assert state.prompts(10) == [prompt]
        assert feedback_counts(state)["not_learned_from"] == {"other_policy": 2}
        state.close()


REPLIES = [f"r{number}" for number in range(2)]
EVENTS = st.one_of(
    st.sampled_from(REPLIES).map(lambda r: exchange(r, prompt_ids=(ord(r[1]) % 2,))),
    st.builds(
        lambda i, r, v, u, at: feedback(f"f{i}", r, value=v, user=u, at=NOW + at),
        st.integers(0, 5),
        st.sampled_from(REPLIES),
        st.sampled_from([0, 1, 1, 0.5]),
        st.sampled_from(["ann", "ann", "bob", None]),
        st.integers(0, 3),
    ),
    st.builds(
        lambda i, pair: feedback(f"p{i}", *pair, kind="preference"),
        st.integers(0, 2),
        st.permutations(REPLIES),
    ),
    st.builds(lambda i: retraction(f"f{i}"), st.integers(0, 5)),
    st.just("nonsense"),
)
Told = Sequence[tuple[Event, int]]
"""Events, each with the partition it lies in."""


def in_log_order(told: Told) -> dict[str, list[Record]]:
    """Partition → its records."""
    log: defaultdict[str, list[Record]] = defaultdict(list)
    for event, number in told:
        [record] = in_partition(number, event)
        place = len(log[record.partition]) + 1
        log[record.partition].append(Record(record.topic, record.partition, place, "", record.event))
    return log


def fates(told: Told) -> dict[str, tuple[str, str | None]]:
    """The statuses spelled out from their definition: of the whole log at once, once nothing is waited for any more."""
    log = in_log_order(told)
    said: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for partition, kept in log.items():
        events = [event for event, number in told if in_partition(number, event)[0].partition == partition]
        for record, event in zip(kept, events, strict=True):
            if isinstance(event, Feedback):
                said[event.id].append((event.at, event.body, partition, record.offset, event))
    winners = {feedback_id: min(each, key=lambda one: one[:4]) for feedback_id, each in said.items()}
    replies = {event.id for event, _ in told if isinstance(event, Exchange)}
    retracted = {event.id for event, _ in told if isinstance(event, Retraction)}
    sound = {i: one for i, one in winners.items() if one[4].kind != "thumb" or one[4].value in (0, 1)}
    groups: defaultdict[object, list[tuple[Any, ...]]] = defaultdict(list)
    for at, _, partition, place, event in sound.values():
        if event.kind == "thumb" and event.content.user is not None:
            groups[event.reply_ids, event.content.user].append((partition, place, at, event.id))
    superseded: dict[str, str] = {}
    for group in groups.values():
        chain = sorted(
            (max(t for other, before, t, _ in group if other == partition and before <= place), partition, place, i)
            for partition, place, _, i in group
        )
        superseded |= {earlier[3]: later[3] for earlier, later in pairwise(chain)}

    def fate(feedback_id: str, event: Feedback) -> tuple[str, str | None]:
        if feedback_id not in sound:
            return "dropped", "malformed"
        if feedback_id in retracted:
            return "retracted", None
        if feedback_id in superseded:
            return "superseded", f"by {superseded[feedback_id]}"
        return ("joined", None) if set(event.reply_ids) <= replies else ("dropped", "no_exchange")

    return {feedback_id: fate(feedback_id, one[4]) for feedback_id, one in winners.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.lists(st.tuples(EVENTS, st.integers(0, 2)), max_size=25), seed=st.integers(0, 10_000))
def test_any_interleaving_of_the_partitions_ends_in_the_state_that_the_definitions_say(
    tmp_path_factory: pytest.TempPathFactory, told: Told, seed: int
):
    """Read in batches of any size, partly twice, broken off, given up in between: always the same."""
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("states")
    endings = []
    for name in ("one.db", "another.db"):
        state = State(folder / name, policy=POLICY, base=BASE)
        left = {partition: list(kept) for partition, kept in in_log_order(told).items()}
        while any(left.values()):
            partition = chance.choice([partition for partition, kept in left.items() if kept])
            batch = left[partition][: chance.randint(1, 6)]
            if chance.random() < 0.3:
                with contextlib.suppress(KeyboardInterrupt), state.transaction() as db:  # all a kill leaves: nothing
                    db.execute("DELETE FROM feedback")
                    raise KeyboardInterrupt
            if chance.random() < 0.3:
                state.close()
                state = State(folder / name, policy=POLICY, base=BASE)
            state.absorb(batch, NOW)
            state.absorb(batch[:2], NOW)
            if chance.random() < 0.3:
                state.give_up_waiting(math.inf, NOW)
            left[partition] = left[partition][len(batch) :]
        state.give_up_waiting(math.inf, NOW)
        endings.append((statuses(state), state.judgements(), state.prompts(9), feedback_counts(state), state.digest()))
        state.close()
    first, second = endings
    assert first[0] == fates(told)
    first[3].pop("late"), second[3].pop("late")
    assert first == second
    times = Counter(event.id for event, _ in told if isinstance(event, Feedback))
    assert first[3]["duplicates"] + first[3]["dropped"].get("conflict", 0) == times.total() - len(times)
