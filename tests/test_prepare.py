"""What the reward model learns from: each reason to leave a judgement out, corrections as pairs, signals beside silence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.events import Message
from learner.direct import liked
from learner.judgement import Judgement, Sample, Words
from learner.prepare import NOBODYS, Unusable, claims, edit_distance, prepare

GOOD, BAD, OTHER = (Sample(name, (1, 2), ids, 0) for name, ids in (("r", (5, 6, 2)), ("q", (7, 2)), ("p", (8, 9, 2))))
AGAIN = replace(GOOD, reply_id="r again")
"""The same reply, served once more."""


def said(
    kind: str,
    value: float = 1.0,
    reply: Sample = GOOD,
    other: Sample | None = None,
    *,
    user: str | None = "ann",
    aspect: str = "overall",
    signal: str | None = None,
    text: str | None = None,
    ranked: tuple[Sample, ...] = (),
) -> Judgement:
    correction = None if text is None else Words((Message(role="user", content="hello"),), text)
    return Judgement("f", kind, user, value, reply, other, 1.0, aspect, signal, correction, ranked)


def encode(words: Words) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A base: numbers in, numbers out, and the end; prompts of more than one message, and of letters, are none of its."""
    if len(words.messages) != 1 or words.text.isalpha():
        raise Unusable(words.text)
    return (1, 2), (*map(int, words.text.split()), *([2] if words.ended else []))


@dataclass(frozen=True)
class Found:
    """What is left, and how many were left out for which reason."""

    judgements: list[Judgement]
    dropped: dict[str, int]


def prepared(*judgements: Judgement, **aspects: float) -> Found:
    """Of these judgements, each of which is another piece of feedback."""
    found = prepare(
        [replace(one, feedback_id=f"f{n}", at=float(n)) for n, one in enumerate(judgements)], encode, aspects
    )
    return Found([replace(one, feedback_id=one.feedback_id and "f", at=1.0) for one in found.judgements], found.dropped)


# Each reason to leave a judgement out


def test_what_says_nothing_is_dropped_as_empty() -> None:
    found = prepared(said("correction", text=" \n"), said("signal"), said("thumb"))
    assert found == Found([said("thumb")], {"empty": 2})


def test_a_comparison_of_a_reply_with_itself_is_dropped_as_the_same() -> None:
    found = prepared(
        said("preference", other=AGAIN),
        said("ranking", other=AGAIN, ranked=(GOOD, AGAIN)),
        said("correction", text="5 6"),
        said("preference", other=BAD),
    )
    assert found == Found([said("preference", other=BAD)], {"same": 3})


def test_a_correction_that_the_model_cannot_take_is_dropped_as_unusable() -> None:
    assert prepared(said("correction", text="foo"), said("thumb")) == Found([said("thumb")], {"unusable": 1})


def test_an_aspect_that_weighs_nothing_is_dropped() -> None:
    found = prepared(said("thumb", aspect="tone"), said("thumb", aspect="safe"), tone=0)
    assert found == Found([said("thumb", aspect="safe")], {"aspect": 1})


def test_an_aspect_weighs_what_it_was_given_whatever_learns_from_it() -> None:
    safe, whole = said("thumb", aspect="safe"), said("thumb", reply=BAD, user="bob")
    found = prepared(safe, whole, said("correction", text="5"), safe=2.5, overall=0.5).judgements
    assert [one.weight for one in found] == [2.5, 0.5, 0.5 / 8]
    assert [one.weight for one in liked(found[:2])] == [2.5, 0.5]  # as KTO, DPO and SFT take it


@pytest.mark.parametrize(
    "once",
    [
        said("thumb"),
        said("rating", 4),
        said("preference", other=BAD),
        said("ranking", other=BAD, ranked=(GOOD, BAD, OTHER)),
        said("correction", text="5 7"),
        said("signal", signal="clicked"),
    ],
    ids=lambda one: one.kind,
)
def test_what_a_person_said_before_is_dropped_as_a_duplicate(once: Judgement) -> None:
    found = prepared(once, replace(once, reply=AGAIN), replace(once, user="bob"))
    assert found.dropped == {"duplicate": 1}
    assert [one.user for one in found.judgements] == ["ann", "bob"]
    unnamed = replace(once, user=None)
    assert prepared(unnamed, unnamed).dropped == {}


def test_of_another_reply_aspect_or_signal_nothing_is_a_duplicate() -> None:
    different = (said("thumb"), said("thumb", reply=BAD), said("thumb", aspect="safe"), said("rating", 5))
    signals = (said("signal", signal="clicked"), said("signal", signal="copied"))
    assert prepared(*different, *signals).dropped == {}


@pytest.mark.parametrize(
    "opposite",
    [
        (said("thumb", 1), said("thumb", 0, AGAIN)),
        (said("thumb", 1), said("rating", 2)),
        (said("rating", 5), said("rating", 1)),
        (said("preference", other=BAD), said("preference", reply=BAD, other=GOOD)),
        (said("preference", other=BAD), said("ranking", reply=OTHER, other=BAD, ranked=(OTHER, BAD, GOOD))),
        (said("correction", text="7"), said("preference", other=BAD)),
    ],
    ids=lambda pair: " ".join(one.kind for one in pair),
)
def test_what_a_person_said_and_denied_is_dropped_as_contradictory(opposite: tuple[Judgement, Judgement]) -> None:
    one, denial = opposite
    found = prepared(one, denial, said("thumb", reply=OTHER))
    assert found == Found([said("thumb", reply=OTHER)], {"contradictory": 2})
    assert prepared(one, replace(denial, user="bob")).dropped == {}
    assert prepared(replace(one, user=None), replace(denial, user=None)).dropped == {}


def test_of_another_aspect_or_in_between_nothing_is_contradictory() -> None:
    assert prepared(said("thumb", 1), said("thumb", 0, aspect="safe"), said("rating", 3)).dropped == {}
    assert list(claims(said("rating", 3))) == list(claims(said("signal", signal="copied"))) == []


def test_of_more_replies_than_a_fit_takes_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.prepare.REPLIES", 3)
    fourth = replace(OTHER, reply_ids=(9, 2))
    long = said("ranking", other=BAD, ranked=(GOOD, BAD, OTHER, fourth))
    old, newest = said("thumb", user="bob"), said("thumb", reply=OTHER)
    found = prepared(old, said("preference", reply=BAD, other=fourth), newest, long, said("signal", signal="copied"))
    assert found.dropped == {"surplus": 3}  # the ranking has too many by itself, the first thumb is the oldest
    assert [one.kind for one in found.judgements] == ["preference", "thumb"]


def test_signals_do_not_crowd_out_the_replies_that_people_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.prepare.REPLIES", 1)
    found = prepared(said("thumb"), said("signal", reply=BAD, signal="copied"), said("signal", signal="copied"))
    assert found == Found([said("thumb"), said("signal", signal="copied")], {"surplus": 1})


def test_what_is_left_out_is_told_by_its_id() -> None:
    named = [said("thumb"), said("thumb", reply=AGAIN), said("signal"), said("rating", 5, user="bob")]
    found = prepare([replace(one, feedback_id=f"f{n}") for n, one in enumerate(named)], encode)
    assert found.left_out == {"f1": "duplicate", "f2": "empty"}
    assert [one.feedback_id for one in found.judgements] == ["f0", "f3"]


# Corrections


def test_a_correction_prefers_what_should_have_been_said_to_what_was() -> None:
    [found] = prepared(said("correction", text="5 7 6")).judgements
    assert (found.reply.reply_ids, found.reply.prompt_ids, found.other) == ((5, 7, 6, 2), (1, 2), GOOD)


@pytest.mark.parametrize(("text", "weight"), [("5", 1 / 8), ("5 6 9 9", 2 / 8), ("9 9 9 9 9 9 9 9 9", 1.0)])
def test_a_correction_counts_by_how_much_it_changed(text: str, weight: float) -> None:
    [found] = prepared(said("correction", text=text)).judgements
    assert found.weight == weight


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("abc", "bc", 1), ("ab", "ba", 2)],
)
def test_the_edit_distance_counts_tokens(one: str, other: str, distance: int) -> None:
    assert edit_distance(one.encode(), other.encode()) == edit_distance(other.encode(), one.encode()) == distance


# Replies of another base


def foreign(text: str, *, ended: bool = True, messages: int = 1) -> Sample:
    """A reply whose token ids are another base's."""
    words = Words((Message(role="user", content="hello"),) * messages, text, ended)
    return Sample(text, (901, 902), (903,), 3, words)


def test_what_another_base_replied_is_judged_in_tokens_of_this_one() -> None:
    one, two, cut = foreign("5 6"), foreign("7"), foreign("8 9", ended=False)
    thumb, preference, ranking, correction, dwell = prepared(
        said("thumb", reply=cut),
        said("preference", reply=one, other=BAD),
        said("ranking", reply=two, other=one, ranked=(two, one, OTHER), user="bob"),
        said("correction", reply=one, text="5 9", user="eve"),
        said("signal", reply=two, signal="dwell"),
    ).judgements
    assert (thumb.reply.prompt_ids, thumb.reply.reply_ids, thumb.reply.version) == ((1, 2), (8, 9), 3)
    assert (preference.reply.reply_ids, preference.other) == ((5, 6, 2), BAD)
    assert [sample.reply_ids for sample in ranking.ranked] == [(7, 2), (5, 6, 2), (8, 9, 2)]
    assert (ranking.reply, ranking.other) == ranking.ranked[:2]
    assert correction.other is not None
    assert (correction.reply.prompt_ids, correction.reply.reply_ids) == ((1, 2), (5, 9, 2))
    assert (correction.other.reply_ids, correction.weight) == ((5, 6, 2), 1 / 8)
    assert dwell.reply.reply_ids == (7, 2)


@pytest.mark.parametrize("bad", [foreign("foo"), foreign("5", messages=2)])
def test_what_another_base_replied_and_this_one_cannot_take_is_dropped_as_unusable(bad: Sample) -> None:
    found = prepared(
        said("thumb", reply=bad),
        said("preference", other=bad),
        said("ranking", ranked=(GOOD, BAD, bad)),
        said("correction", reply=bad, text="5"),
        said("signal", reply=bad, signal="copied"),
        said("thumb"),
    )
    assert found == Found([said("thumb")], {"unusable": 5})


def test_the_same_words_are_the_same_reply_whichever_base_said_them() -> None:
    assert prepared(said("thumb"), said("thumb", reply=foreign("5 6"))).dropped == {"duplicate": 1}
    assert prepared(said("thumb"), said("thumb", 0, reply=foreign("5 6"))).dropped == {"contradictory": 2}
    assert prepared(said("preference", other=foreign("5 6"))).dropped == {"same": 1}


# Signals


def test_replies_that_got_no_signal_stand_against_those_that_did() -> None:
    thumbs = [said("thumb", reply=one, user="bob") for one in (GOOD, BAD, OTHER)]
    signal = said("signal", 7.0, signal="copied")
    *_, came, first, second = prepared(*thumbs, signal).judgements
    assert came == replace(signal, value=1.0)
    assert [(one.reply, one.value, one.user, one.weight) for one in (first, second)] == [
        (BAD, 0.0, None, 0.5),
        (OTHER, 0.0, None, 0.5),
    ]
    assert first.feedback_id == NOBODYS


def test_replies_that_were_imported_say_nothing_by_their_silence() -> None:
    imported = replace(BAD, live=False)
    thumbs = [said("thumb", reply=one, user="bob") for one in (imported, OTHER)]
    pair = said("preference", reply=replace(AGAIN, live=False), other=imported)
    *_, silent = prepared(*thumbs, pair, said("signal", reply=AGAIN, signal="copied")).judgements
    assert (silent.reply, silent.value, silent.weight) == (OTHER, 0.0, 1.0)
    [_, _, came] = prepared(*thumbs[:1], pair, said("signal", reply=AGAIN, signal="copied")).judgements
    assert came.value == 1.0


def test_a_signal_of_value_0_did_not_come() -> None:
    [found] = prepared(said("signal", 0.0, signal="clicked")).judgements
    assert found.value == 0.0


def test_a_dwell_is_long_or_short_by_their_median() -> None:
    seconds = (1.0, 2.0, 30.0)
    found = prepared(*(said("signal", value, signal="dwell", user=f"u{value}") for value in seconds)).judgements
    assert [one.value for one in found] == [0.0, 0.0, 1.0]


@given(st.lists(st.integers(0, 3), max_size=14), st.lists(st.integers(0, 3), max_size=14))
def test_the_edit_distance_is_levenshteins_up_to_its_bound(one: list[int], other: list[int]) -> None:
    row = list(range(len(other) + 1))
    for number, token in enumerate(one, 1):
        left, row = row, [number]
        for place, wanted in enumerate(other, 1):
            row.append(min(left[place] + 1, row[-1] + 1, left[place - 1] + (token != wanted)))
    assert edit_distance(one, other, 5) == min(row[-1], 5)
