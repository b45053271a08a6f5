"""The story of a feedback, as an operator asks for it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deploy.why import LEFT_OUT
from learner.ledger import Learned, Ledger
from learner.prepare import Prepared
from learner.state import State
from tests.commands import Heed
from tests.told import NOW, exchange, feedback, records, retraction


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "heed-data" / "learner" / "state.db", policy="default", base="base-fingerprint")
    yield state
    state.close()


def why(heed: Heed, one: str, **variables: str) -> dict[str, Any]:
    done = heed("feedback", "why", one, "--json", **variables)
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert isinstance(told, dict)
    return told


def learn(state: State, **left_out: str) -> None:
    """An update over all that is fresh, but for what is left out; released as v1 and served."""
    ledger = Ledger(state)
    update = ledger.begin(current=0, parent=0, above=0, now=NOW + 20)
    ledger.used(update, {one.feedback_id: left_out.get(one.feedback_id) for one in state.judgements()})
    learned = Learned({}, {}, {"in_reward_model": NOW + 25, "in_update": NOW + 30})
    ledger.released(ledger.published(update, 1, learned), NOW + 39)
    state.note_served({1: NOW + 40})


def test_a_story_goes_from_acceptance_to_the_version_that_is_served(state: State, heed: Heed):
    state.absorb(records(exchange("r"), feedback("f", "r", value=0, at=NOW + 5)), NOW + 10)
    learn(state)
    [told] = why(heed, "f")["feedback"]
    assert (told["status"], told["counts"], told["why_not"]) == ("served", True, None)
    assert [(step["status"], step["at"] - NOW) for step in told["history"]] == [
        ("accepted", 5), ("joined", 10), ("in_reward_model", 25), ("in_update", 30), ("in_version", 39), ("served", 40)
    ]  # fmt: skip
    assert told["history"][4]["version"] == "v1"
    assert told["update"] == {"number": 1, "status": "released", "version": "v1", "why": None}
    [reply] = told["replies"]
    assert (reply["version"], reply["completion"]) == ("v0", "there")

    page = heed("feedback", "why", "f").out
    for words in ("f: served", "thumb: down, by ann", "in_version update 1 v1", "counts", "yes", "hello", "there"):
        assert words in page


def test_a_reply_that_was_imported_is_nobodys_of_ours(state: State, heed: Heed):
    state.absorb(records(exchange("r", source="imported"), feedback("f", "r", at=NOW - 1e6)), NOW)
    learn(state)
    [told] = why(heed, "f")["feedback"]
    assert (told["status"], told["replies"][0]["version"]) == ("in_version", None)
    assert "somebody else: it was imported" in heed("feedback", "why", "f").out


def test_a_reply_has_the_stories_of_all_that_was_said_of_it(state: State, heed: Heed):
    state.absorb(
        records(
            *(exchange(f"r{i}") for i in range(3)),
            feedback("thumb", "r2"),
            feedback("pair", "r1", "r2", kind="preference"),
            feedback("order", "r0", "r1", "r2", kind="ranking"),
            feedback("other", "r1"),
        ),
        NOW,
    )
    told = why(heed, "r2")
    assert told["reply"]["id"] == "r2"
    assert [one["id"] for one in told["feedback"]] == ["thumb", "pair", "order"]
    assert "reply r2" in heed("feedback", "why", "r2").out


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([feedback("f", "r"), feedback("g", "r", value=0)], "said something else of this reply later (g)"),
        ([feedback("f", "r"), retraction("f")], "it was taken back"),
        ([feedback("f", "nowhere")], "it waits for nowhere, which the learner has not read yet"),
        ([feedback("f", "r", value=7)], "it does not say what its kind must say"),
        ([feedback("f", "r", kind="comment")], "comments are kept for people to read"),
        ([exchange("e", reply_ids=()), feedback("f", "e")], "the reply has no tokens"),
        ([exchange("p", policy="other"), feedback("f", "p", "r", kind="preference")], "different policies"),
        ([exchange("p", policy="other"), feedback("f", "p")], "the policy other, and this is default"),
    ],
)
def test_what_does_not_count_says_why(events: list[Any], words: str, state: State, heed: Heed):
    state.absorb(records(exchange("r"), *events), NOW)
    [told] = why(heed, "f")["feedback"]
    assert not told["counts"]
    assert words in told["why_not"]
    page = heed("feedback", "why", "f").out
    assert "no: " in page


def test_feedback_on_a_reply_of_another_base_counts_and_waits_for_this_ones_first_update(
    state: State, heed: Heed, tmp_path: Path
):
    pair = feedback("pair", "o", "r", kind="preference")
    state.absorb(records(exchange("o", base="older"), exchange("r"), feedback("f", "o"), pair), NOW)
    for one in ("f", "pair"):
        [told] = why(heed, one)["feedback"]
        assert (told["counts"], told["why_not"], told["update"]) == (True, None, None)
    learn(state, pair="same")
    assert "first in update 1" in heed("feedback", "why", "f").out
    state.close()
    with closing(State(tmp_path / "heed-data" / "learner" / "state.db", policy="default", base="newer")) as newer:
        Ledger(newer).adopt([], ())
        assert why(heed, "pair")["feedback"][0]["counts"]  # an update of the base before left it out, none of this one
        page = heed("feedback", "why", "f").out
        assert "in_version update 1 v1" in page
        assert "not yet with this base model: the next update will" in page


def test_what_an_update_left_out_says_why(state: State, heed: Heed):
    state.absorb(records(exchange("r"), feedback("f", "r"), feedback("g", "r", user="bob")), NOW)
    learn(state, f="duplicate")
    [told] = why(heed, "f")["feedback"]
    assert (told["status"], told["counts"], told["update"]) == ("joined", False, None)
    assert told["why_not"] == "the last update left it out: the same person had said the same of the same reply"
    assert why(heed, "g")["feedback"][0]["status"] == "served"
    assert set(LEFT_OUT) == set(re.findall(r"`(\w+)`:", inspect.getsource(Prepared)))


def test_what_is_said_of_an_aspect_that_weighs_nothing_is_promised_no_update(state: State, heed: Heed):
    state.absorb(records(exchange("r"), feedback("f", "r", aspect="tone")), NOW)
    assert why(heed, "f")["feedback"][0]["counts"]
    [told] = why(heed, "f", HEED_ASPECT_WEIGHTS="tone=0")["feedback"]
    assert (told["counts"], told["why_not"]) == (False, "its aspect weighs nothing (HEED_ASPECT_WEIGHTS)")


def test_feedback_that_waits_too_long_says_for_what(state: State, heed: Heed):
    state.absorb(records(feedback("f", "nowhere")), NOW)
    state.give_up_waiting(NOW + 1, NOW + 1)
    [told] = why(heed, "f")["feedback"]
    assert (told["status"], told["replies"]) == ("dropped", [{"id": "nowhere", "known": False}])
    assert "did not come before HEED_JOIN_WAIT_S was over" in told["why_not"]


def test_an_id_that_nobody_knows_says_what_that_may_mean(state: State, heed: Heed):
    done = heed("feedback", "why", "fb-unknown")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "fb-unknown. It may not have read it yet (is it running?), it may belong to another data folder" in done.err
    assert state.judgement_count(fresh=False) == 0


def test_without_a_state_it_says_how_one_is_made(heed: Heed):
    done = heed("feedback", "why", "fb-unknown")
    assert done.code == 1
    assert "once: heed learn --until-idle" in done.err


def test_a_state_of_a_newer_heed_or_a_damaged_one_is_refused(state: State, heed: Heed, tmp_path: Path):
    state.db.execute("PRAGMA user_version = 99")
    assert "has schema 99; this Heed reads 1 to" in heed("feedback", "why", "f").err
    state.close()
    (tmp_path / "heed-data" / "learner" / "state.db").write_bytes(b"no database" * 1000)
    assert "heed learn --rebuild makes it anew" in heed("feedback", "why", "f").err
