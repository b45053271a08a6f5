"""The learner's state: every feedback in exactly one status, once, whatever the order and whatever is killed."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.events import EXCHANGES, FEEDBACK, Message
from learner.judgement import Sample, Words
from learner.ledger import Learned, Ledger
from learner.report import dropped, feedback_counts, freshness, liked
from learner.state import State
from learner.statefile import StateError, open_state, remove_state
from tests.told import BASE, NOW, POLICY, exchange, feedback, records, retraction


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    yield state
    state.close()


def statuses(state: State) -> dict[str, tuple[str, str | None]]:
    rows = state.db.execute("SELECT id, status, reason FROM feedback")
    return {feedback_id: (status, reason) for feedback_id, status, reason in rows}


def story(state: State, feedback_id: str) -> list[str]:
    rows = state.db.execute("SELECT status FROM stories WHERE feedback_id = ? ORDER BY rowid", (feedback_id,))
    return [status for (status,) in rows]


def test_feedback_joins_its_exchange(state: State):
    state.absorb(records(exchange("r", version=3), feedback("f", "r", value=0, at=NOW + 5)), NOW)
    [judgement] = state.judgements()
    assert (judgement.feedback_id, judgement.kind, judgement.user, judgement.value) == ("f", "thumb", "ann", 0.0)
    assert (judgement.reply.prompt_ids, judgement.reply.reply_ids, judgement.reply.version) == ((1, 2, 3), (4, 5), 3)
    assert (judgement.other, judgement.at) == (None, NOW + 5)
    assert story(state, "f") == ["joined"]


def test_the_newest_judgements_are_the_last_ones_that_were_given(state: State):
    times = {"d": 3.0, "b": 1.0, "a": 0.0, "c": 1.0}
    pairs = [(exchange(f"r{name}"), feedback(f"f{name}", f"r{name}", at=NOW + at)) for name, at in times.items()]
    state.absorb(records(*(event for pair in pairs for event in pair)), NOW)
    assert [one.feedback_id for one in state.judgements()] == ["fa", "fb", "fc", "fd"]
    assert [one.feedback_id for one in state.judgements(2)] == ["fc", "fd"]


def test_feedback_waits_for_its_exchange(state: State):
    state.absorb(records(feedback("f", "r")), NOW)
    assert statuses(state) == {"f": ("pending", None)}
    state.absorb(records(exchange("r")), NOW)
    assert statuses(state) == {"f": ("joined", None)}


def test_a_preference_waits_for_both_replies(state: State):
    state.absorb(records(feedback("f", "good", "bad", kind="preference"), exchange("bad")), NOW)
    assert statuses(state) == {"f": ("pending", None)}
    state.absorb(records(exchange("good", reply_ids=(9,)), first=2), NOW)
    [judgement] = state.judgements()
    assert judgement.value == 1.0
    assert judgement.reply.reply_id == "good"
    assert judgement.reply.reply_ids == (9,)
    assert judgement.other is not None
    assert judgement.other.reply_id == "bad"


def test_feedback_whose_exchange_never_comes_is_dropped(state: State):
    state.absorb(records(feedback("late", "r", at=NOW - 100), feedback("soon", "q", at=NOW)), NOW)
    assert state.give_up_waiting(NOW - 50, NOW) == 1
    assert statuses(state) == {"late": ("dropped", "no_exchange"), "soon": ("pending", None)}
    assert dropped(state) == {"no_exchange": 1}


def test_the_same_feedback_twice_counts_once(state: State):
    twice = feedback("f", "r")
    state.absorb(records(exchange("r"), twice, twice), NOW)
    assert len(state.judgements()) == 1
    assert feedback_counts(state)["duplicates"] == 1
    assert dropped(state) == {}


def test_another_body_under_the_same_id_is_a_conflict_and_the_first_wins(state: State):
    first, second = feedback("f", "r", value=1), feedback("f", "r", value=0, at=NOW + 1)
    state.absorb(records(exchange("r"), first, second), NOW)
    assert [judgement.value for judgement in state.judgements()] == [1.0]
    assert dropped(state) == {"conflict": 1}


def test_records_read_again_change_nothing(state: State):
    batch = records(exchange("r"), feedback("f", "r"), feedback("f", "r"))
    assert state.absorb(batch, NOW) == 3
    before = state.digest()
    assert state.absorb(batch, NOW) == 0
    assert state.digest() == before
    assert state.offsets() == {EXCHANGES: 1, FEEDBACK: 2}


def test_a_later_opinion_supersedes_the_earlier_one(state: State):
    state.absorb(
        records(
            exchange("r"),
            feedback("up", "r", value=1),
            feedback("stars", "r", kind="rating", value=2),
            feedback("other aspect", "r", value=1, aspect="safety"),
            feedback("other person", "r", value=1, user="bob"),
            feedback("nobody", "r", value=1, user=None),
            feedback("nobody again", "r", value=0, user=None),
        ),
        NOW,
    )
    assert {name for name, (status, _) in statuses(state).items() if status == "superseded"} == {"up"}
    assert statuses(state)["up"] == ("superseded", "by stars")
    assert story(state, "up") == ["joined", "superseded"]


def test_an_opinion_is_superseded_while_it_waits(state: State):
    state.absorb(records(feedback("first", "r", value=1), feedback("second", "r", value=0)), NOW)
    state.absorb(records(exchange("r")), NOW)
    assert statuses(state) == {"first": ("superseded", "by second"), "second": ("joined", None)}


def test_other_kinds_supersede_nothing(state: State):
    state.absorb(
        records(
            exchange("r"), feedback("a", "r", kind="comment"), feedback("b", "r", kind="comment"), feedback("c", "r")
        ),
        NOW,
    )
    assert {status for status, _ in statuses(state).values()} == {"joined"}


@pytest.mark.parametrize("early", [True, False])
def test_a_retraction_counts_before_and_after_its_feedback(state: State, early: bool):
    said, taken_back = feedback("f", "r"), retraction("f")
    pair = (taken_back, said) if early else (said, taken_back)
    state.absorb(records(exchange("r"), *pair, said, retraction("f")), NOW)
    assert statuses(state) == {"f": ("retracted", None)}
    assert state.judgements() == []
    assert feedback_counts(state)["duplicates"] == 1


def test_a_retracted_opinion_still_replaced_the_one_before_it(state: State):
    events = (feedback("first", "r", value=1), feedback("second", "r", value=0))
    state.absorb(records(exchange("r"), *events, retraction("second"), retraction("first")), NOW)
    assert statuses(state) == {"first": ("retracted", None), "second": ("retracted", None)}


def test_every_kind_is_joined_and_all_but_comments_are_learned_from(state: State):
    state.absorb(
        records(
            exchange("r"),
            exchange("q"),
            feedback("thumb", "r"),
            feedback("rating", "r", kind="rating", value=5, user="bob"),
            feedback("preference", "r", "q", kind="preference"),
            feedback("ranking", "q", "r", kind="ranking"),
            feedback("correction", "r", kind="correction"),
            feedback("comment", "r", kind="comment"),
            feedback("signal", "r", kind="signal", value=None),
            feedback("aspect", "r", aspect="safety"),
        ),
        NOW,
    )
    assert {status for status, _ in statuses(state).values()} == {"joined"}
    assert {one.feedback_id for one in state.judgements()} == {
        "thumb", "rating", "preference", "ranking", "correction", "signal", "aspect",
    }  # fmt: skip
    assert feedback_counts(state)["not_learned_from"] == {"kind": 1}
    assert state.judgement_count(fresh=False) == 7
    assert state.judgement_count(fresh=True) == 4  # rankings, corrections and signals start no update


def test_rankings_corrections_signals_and_aspects_bring_what_they_need(state: State):
    state.absorb(
        records(
            *(exchange(name, prompt="hi", reply_ids=(number,)) for number, name in enumerate("rqp")),
            feedback("ranking", "q", "p", "r", kind="ranking"),
            feedback("correction", "r", kind="correction", text="better", at=NOW + 1),
            feedback("signal", "r", kind="signal", signal="dwell", value=2.5, at=NOW + 2),
            feedback("aspect", "r", aspect="safe", at=NOW + 3),
        ),
        NOW,
    )
    ranking, correction, signal, aspect = state.judgements()
    assert [one.reply_id for one in ranking.ranked] == ["q", "p", "r"]
    assert [one.reply_ids for one in ranking.ranked] == [(1,), (2,), (0,)]
    assert correction.correction == Words((Message(role="user", content="hi"),), "better")
    assert (signal.signal, signal.value) == ("dwell", 2.5)
    assert aspect.aspect == "safe"


def test_replies_of_another_base_are_judged_in_words(state: State):
    state.absorb(
        records(
            exchange("own"),
            exchange("other", base="another", prompt="hi", reply="well", version=7),
            exchange("cut", base="a third", reply="we", finish_reason="length"),
            exchange("stopped", base="a third", reply="we", stop=("\n",)),
            feedback("thumb", "other"),
            feedback("pair", "own", "other", kind="preference", at=NOW + 1),
            feedback("order", "cut", "stopped", "own", "other", kind="ranking", at=NOW + 2),
            feedback("edit", "other", kind="correction", text="better", at=NOW + 3),
        ),
        NOW,
    )
    hi = (Message(role="user", content="hi"),)
    thumb, pair, order, edit = state.judgements()
    assert thumb.reply == Sample("other", (1, 2, 3), (4, 5), 7, Words(hi, "well"))
    assert (pair.reply.words, pair.other) == (None, thumb.reply)
    assert [one.words and one.words.ended for one in order.ranked] == [False, False, None, True]
    assert (edit.reply, edit.correction) == (thumb.reply, Words(hi, "better"))
    assert state.judgement_count(fresh=True) == 2
    assert state.prompts(9) == [(1, 2, 3)]
    assert feedback_counts(state)["not_learned_from"] == {}
    assert liked(state) == {}


def test_what_was_said_elsewhere_is_known_as_such_wherever_it_stands(state: State):
    state.absorb(
        records(
            exchange("r"),
            exchange("i", source="imported"),
            feedback("thumb", "r"),
            feedback("imported", "i", at=NOW + 1),
            feedback("preference", "r", "i", kind="preference", at=NOW + 2),
            feedback("ranking", "i", "r", kind="ranking", at=NOW + 3),
        ),
        NOW,
    )
    thumb, imported, preference, ranking = state.judgements()
    assert (thumb.reply.live, imported.reply.live) == (True, False)
    assert preference.other is not None
    assert (preference.reply.live, preference.other.live) == (True, False)
    assert [one.live for one in ranking.ranked] == [False, True]


def test_signals_do_not_crowd_out_what_people_said(state: State):
    clicks = (feedback(f"s{n}", "r", kind="signal", signal="clicked", value=None, at=NOW + 9 + n) for n in range(5))
    state.absorb(records(exchange("r"), feedback("old", "r", at=NOW), *clicks), NOW)
    assert [one.feedback_id for one in state.judgements(3)] == ["old", "s3", "s4"]


def test_what_cannot_be_learned_from_is_kept_and_counted(state: State):
    state.absorb(
        records(
            exchange("r"),
            exchange("elsewhere", policy="other"),
            exchange("silent", reply_ids=()),
            feedback("mixed", "r", "elsewhere", kind="preference"),
            feedback("elsewhere", "elsewhere"),
            feedback("silent", "silent"),
        ),
        NOW,
    )
    assert state.judgements() == []
    assert feedback_counts(state)["not_learned_from"] == {"other_policy": 2, "empty_reply": 1}
    assert state.prompts(10) == [(1, 2, 3)]


@pytest.mark.parametrize(
    "bad",
    [
        feedback("f"),
        feedback("f", "r", "q"),
        feedback("f", "r", value=0.5),
        feedback("f", "r", kind="rating", value=6),
        feedback("f", "r", kind="rating", value=3.5),
        feedback("f", "r", kind="preference"),
        feedback("f", "r", "r", kind="preference"),
        feedback("f", "r", kind="ranking"),
    ],
)
def test_feedback_that_makes_no_sense_is_dropped(state: State, bad: object):
    state.absorb(records(exchange("r"), exchange("q"), bad), NOW)  # type: ignore[arg-type]
    assert statuses(state) == {"f": ("dropped", "malformed")}
    assert dropped(state) == {"malformed": 1}


def test_what_is_no_event_or_newer_is_counted_and_stops_nothing(state: State):
    newer = json.dumps({"schema": 99, "type": "feedback", "mood": "♥"})
    state.absorb(records(exchange("r"), "nonsense", newer, '{"schema": 1}', feedback("f", "r")), NOW)
    assert len(state.judgements()) == 1
    assert dropped(state) == {"malformed": 2, "newer_schema": 1}


def test_a_parked_event_is_taken_once_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    future = feedback("f", "r", value=0).model_copy(update={"schema_": 2}).to_json()
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    state.absorb(records(exchange("r"), future, feedback("g", "r", value=1)), NOW)
    assert dropped(state) == {"newer_schema": 1}
    state.close()
    monkeypatch.setattr("learner.state.SCHEMA", 2)
    monkeypatch.setattr("feedback.events.SCHEMA", 2)
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    assert dropped(state) == {}
    # it stands before g in its partition, so g, which came first to us, is still the later opinion
    assert statuses(state) == {"f": ("superseded", "by g"), "g": ("joined", None)}
    state.close()


def test_prompts_are_distinct_and_the_newest_come_first(state: State):
    ids = [(3,), (2,), (1,), (1,)]
    times = [3, 1, 0, 2]
    sent = zip(ids, times, strict=True)
    state.absorb(records(*(exchange(f"r{at}", prompt_ids=prompt, at=NOW + at) for prompt, at in sent)), NOW)
    assert state.prompts(10) == [(3,), (1,), (2,)]
    assert state.prompts(2) == [(3,), (1,)]
    state.absorb(records(exchange("r9", prompt_ids=(0,), at=NOW + 3), first=5), NOW)
    assert state.prompts(2) == [(0,), (3,)]  # of the same time, by id


def test_liked_is_a_share_by_version_of_what_counts(state: State):
    state.absorb(
        records(
            exchange("r", version=0),
            exchange("q", version=2),
            feedback("a", "r", value=1, user="a"),
            feedback("b", "r", value=0, user="a"),
            feedback("c", "r", kind="rating", value=4, user="b"),
            feedback("d", "r", kind="rating", value=3, user="c"),
            feedback("e", "q", value=1),
        ),
        NOW,
    )
    assert liked(state) == {
        "v0": {"share": pytest.approx(1 / 3, abs=1e-3), "count": 3},
        "v2": {"share": 1.0, "count": 1},
    }


def test_what_was_imported_is_learned_from_and_says_nothing_of_any_version(state: State):
    state.absorb(
        records(
            exchange("past", source="imported", prompt_ids=(7,)),
            exchange("worse", source="imported", prompt_ids=(7,), reply_ids=(9,)),
            exchange("live"),
            feedback("f", "past", value=1, at=NOW - 1e6),
            feedback("p", "past", "worse", kind="preference", at=NOW - 1e6),
            feedback("g", "live", value=0, at=NOW + 1),
        ),
        NOW + 1,
    )
    assert [one.feedback_id for one in state.judgements()] == ["f", "p", "g"]
    assert sorted(state.prompts(9)) == [(1, 2, 3), (7,)]
    assert liked(state) == {"v0": {"share": 0.0, "count": 1}}
    ledger = Ledger(state)
    update = ledger.begin(current=0, parent=0, above=0, now=NOW + 2)
    ledger.released(ledger.published(update, 1, Learned({}, {}, {})), NOW + 3)
    assert state.note_served({1: NOW + 4}) == [3.0]
    assert story(state, "f") == ["joined", "in_version"]


def test_freshness_counts_from_acceptance_to_being_served(state: State):
    state.absorb(records(exchange("r"), *(feedback(f"f{i}", "r", user=None, at=NOW + i) for i in range(10))), NOW + 20)
    ledger = Ledger(state)
    update = ledger.begin(current=0, parent=0, above=0, now=NOW + 20)
    update = ledger.published(update, 1, Learned({}, {}, {"in_reward_model": NOW + 25, "in_update": NOW + 30}))
    assert state.note_served({1: NOW + 40}) == []
    ledger.released(update, NOW + 39)
    assert state.note_served({}) == []
    assert sorted(state.note_served({2: NOW + 40})) == [31.0 + i for i in range(10)]
    assert state.note_served({1: NOW + 41, 2: NOW + 40}) == []
    assert freshness(state) == {"p50": 36.0, "p95": 40.0, "count": 10}
    assert story(state, "f0") == ["joined", "in_reward_model", "in_update", "in_version"]


def events(draw: st.DrawFn) -> list[object]:
    """A jumble of exchanges, feedback of every fate, retractions and nonsense."""
    replies = [f"r{i}" for i in range(4)]
    one = st.one_of(
        st.builds(lambda r: exchange(r, reply_ids=(5,)), st.sampled_from(replies)),
        st.builds(
            lambda i, r, v, u: feedback(f"f{i}", r, value=v, user=u),
            st.integers(0, 9),
            st.sampled_from(replies),
            st.integers(0, 1),
            st.sampled_from(["ann", "bob", None]),
        ),
        st.builds(
            lambda i, pair: feedback(f"p{i}", *pair, kind="preference"),
            st.integers(0, 3),
            st.permutations(replies).map(lambda order: order[:2]),
        ),
        st.builds(lambda i: retraction(f"f{i}"), st.integers(0, 9)),
        st.just("nonsense"),
    )
    return draw(st.lists(one, max_size=30))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jumble=st.composite(events)(), cuts=st.lists(st.integers(0, 30)), seed=st.integers(0, 99))
def test_any_cut_of_the_log_into_batches_ends_in_the_same_state(
    tmp_path_factory: pytest.TempPathFactory, jumble: list[object], cuts: list[int], seed: int
):
    """Batches of any size, read in any interleaving of the topics, parts read twice: the digest is the same."""
    folder = tmp_path_factory.mktemp("state")
    whole = records(*jumble)  # type: ignore[arg-type]
    once = State(folder / "once.db", policy=POLICY, base=BASE)
    once.absorb(whole, NOW)

    piecewise = State(folder / "piecewise.db", policy=POLICY, base=BASE)
    order = random.Random(seed)
    topics = {topic: [r for r in whole if r.topic == topic] for topic in (EXCHANGES, FEEDBACK)}
    while any(topics.values()):
        topic = order.choice([topic for topic, left in topics.items() if left])
        size = 1 + order.choice([0, *cuts])
        batch, topics[topic] = topics[topic][:size], topics[topic][size:]
        piecewise.absorb(batch, NOW)
        piecewise.absorb(batch[: size // 2], NOW)

    assert piecewise.digest() == once.digest()
    told = Counter(event.id for event in jumble if getattr(event, "type", "") == "feedback")  # type: ignore[attr-defined]
    assert set(statuses(once)) == set(told)
    counts = feedback_counts(once)
    assert sum(counts["by_status"].values()) == len(told)
    assert counts["duplicates"] + counts["dropped"].get("conflict", 0) == sum(told.values()) - len(told)
    once.close()
    piecewise.close()


def test_a_batch_is_absorbed_wholly_or_not_at_all(state: State, monkeypatch: pytest.MonkeyPatch):
    before = state.digest()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learner.joining.Joiner.take_retraction", killed)
    with pytest.raises(KeyboardInterrupt):
        state.absorb(records(exchange("r"), feedback("f", "r"), retraction("f")), NOW)
    assert state.digest() == before
    assert state.offsets() == {}
    monkeypatch.undo()
    state.absorb(records(exchange("r"), feedback("f", "r"), retraction("f")), NOW)
    assert statuses(state) == {"f": ("retracted", None)}


def test_a_killed_process_leaves_a_state_that_goes_on(tmp_path: Path):
    """kill -9 in the middle of a transaction, for real: what it had begun is gone, what it had ended is there."""
    program = f"""
import os, pathlib, signal
from learner.state import State
from tests.told import *
state = State(pathlib.Path({str(tmp_path / "state.db")!r}), policy=POLICY, base=BASE)
state.absorb(records(exchange("r"), feedback("f", "r")), NOW)
with state.transaction() as db:
    db.execute("DELETE FROM feedback")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert done.returncode == -9
    state = State(tmp_path / "state.db", policy=POLICY, base=BASE)
    assert statuses(state) == {"f": ("joined", None)}
    state.close()


def test_a_state_of_a_newer_heed_is_refused(tmp_path: Path):
    path = tmp_path / "state.db"
    open_state(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(StateError, match=r"schema 7; this Heed reads up to 6.*heed learn --rebuild"):
        open_state(path)


@pytest.mark.parametrize("content", [b"this is no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_corrupt_state_is_refused_with_the_way_out(tmp_path: Path, content: bytes):
    path = tmp_path / "state.db"
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"cannot be used .*heed learn --rebuild"):
        open_state(path)
    remove_state(path)
    open_state(path).close()


def test_a_database_of_someone_else_is_left_alone(tmp_path: Path):
    path = tmp_path / "state.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    with pytest.raises(StateError, match="tables that are not ours"):
        open_state(path)
