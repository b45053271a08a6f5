"""Stop texts: found across any border of tokens, and never half given out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.reply import ReplyText
from tests import bases

CHAT = bases.chat()


def ids_of(text: str) -> list[int]:
    """Letter by letter, so that every border is a border of tokens."""
    return [i for letter in text for i in CHAT.tokenizer.encode(letter, add_special_tokens=False)]


def say(text: str, stops: list[str]) -> tuple[list[str], ReplyText]:
    """The pieces given out, up to the id at which the reply ends."""
    made, given_out = ReplyText(CHAT, stops), []
    ids = ids_of(text)
    for i, token_id in enumerate(ids):
        given_out.append(made.push(token_id, last=i == len(ids) - 1))
        if made.stopped:
            break
    return given_out, made


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab😀"), max_size=30),
    stops=st.lists(st.text(st.sampled_from("ab😀"), min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop_text_that_is_whole(text: str, stops: list[str]):
    given_out, made = say(text, stops)
    # by definition: letter by letter, the reply ends as soon as any stop text is in it
    expected = text
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(given_out) == made.whole() == expected
    assert made.stopped == (expected != text)
    for count in range(len(given_out)):
        sofar = "".join(given_out[:count])
        assert expected.startswith(sofar)


def test_only_what_may_begin_a_stop_text_is_held_back():
    given_out, made = say("one END two EN three", ["END!", "xx"])
    assert given_out == [*"one ", "", "", "", "END ", *"two ", "", "", "EN ", *"three"]
    assert made.whole() == "one END two EN three"


@pytest.mark.parametrize("end", [True, False])
def test_what_was_held_back_belongs_to_a_reply_that_ends(end: bool):
    made = ReplyText(CHAT, ["STOP"])
    ids = ids_of("a STO")
    pieces = [made.push(i, last=end and n == len(ids) - 1) for n, i in enumerate(ids)]
    assert pieces == ["a", " ", "", "", "STO" if end else ""]
    assert made.whole() == "a STO"


def test_an_id_without_text_says_nothing_and_releases_the_rest():
    made = ReplyText(CHAT, ["STOP"])
    assert [made.push(i, last=False) for i in ids_of("ST")] == ["", ""]
    assert made.push(None, last=True) == "ST"
