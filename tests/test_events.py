"""The wire contract: what is written is read back the same, and what is newer is told apart from what is broken."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from feedback.events import (
    SCHEMA,
    Exchange,
    ExchangeContent,
    Feedback,
    FeedbackContent,
    Message,
    NewerSchema,
    Release,
    ReleaseChange,
    Retraction,
    SamplingUsed,
    parse_event,
)

SAMPLING = SamplingUsed(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=80, seed=None, stop=("\n\n",))

EXCHANGE = Exchange(
    at=1763730000.25,
    id="chatcmpl-abc:1",
    policy="default",
    version=3,
    base="sha256:00",
    caller="ann",
    conversation="conv-1",
    turn=2,
    finish_reason="stop",
    sampling=SAMPLING,
    ask=True,
    content=ExchangeContent(
        user="ann",
        messages=(Message(role="user", content="hi 🙂"),),
        prompt_ids=(1, 2, 3),
        reply="hello\u2028",
        reply_ids=(4, 5),
        logprobs=(-0.1, -1e-9),
        raw_logprobs=(-0.30000000000000004, 0.0),
        metadata={"app": "test"},
    ),
)

FEEDBACK = Feedback(
    at=1763730001.5,
    id="fb-1",
    caller="ann",
    kind="rating",
    reply_ids=("chatcmpl-abc",),
    value=4,
    body="digest",
    content=FeedbackContent(user="ann"),
)


@pytest.mark.parametrize("event", [EXCHANGE, FEEDBACK, Retraction(at=1.0, id="fb-1", caller="ann")])
def test_what_is_written_is_read_back_the_same(event: Exchange | Feedback | Retraction) -> None:
    assert parse_event(event.to_json()) == event
    assert parse_event(event.to_json().encode()) == event
    assert json.loads(event.to_json())["schema"] == SCHEMA


def test_an_exchange_of_an_older_heed_was_served():
    old = json.loads(EXCHANGE.to_json())
    del old["source"]
    event = parse_event(json.dumps(old))
    assert isinstance(event, Exchange)
    assert event.live
    assert not event.model_copy(update={"source": "imported"}).live


@settings(max_examples=100, deadline=None)
@given(
    reply=st.text(),
    logprobs=st.lists(st.floats(max_value=0, allow_nan=False, allow_infinity=False)).map(tuple),
    metadata=st.dictionaries(st.text(), st.text()),
)
def test_any_reply_and_any_log_probs_survive(reply: str, logprobs: tuple[float, ...], metadata: dict[str, str]) -> None:
    content = EXCHANGE.content.model_copy(
        update={"reply": reply, "logprobs": logprobs, "raw_logprobs": logprobs, "metadata": metadata}
    )
    event = EXCHANGE.model_copy(update={"content": content})
    assert parse_event(event.to_json()) == event


def test_everything_about_a_person_lies_in_content() -> None:
    written = json.loads(EXCHANGE.to_json())
    content = written.pop("content")
    assert content.keys() >= {"user", "messages", "prompt_ids", "reply", "reply_ids"}
    assert "hello" not in json.dumps(written)
    written = json.loads(FEEDBACK.model_copy(update={"content": FeedbackContent(user="ann", text="words")}).to_json())
    assert written.pop("content")["text"] == "words"
    assert "words" not in json.dumps(written)


def test_a_newer_schema_is_told_apart_even_when_nothing_else_is_known() -> None:
    newer = {"schema": SCHEMA + 1, "type": "hologram", "shape": {"what": "ever"}}
    with pytest.raises(NewerSchema, match=rf"schema {SCHEMA + 1}; this Heed reads up to {SCHEMA}. Upgrade"):
        parse_event(json.dumps(newer))


def test_an_additional_field_is_passed_over() -> None:
    written = json.loads(FEEDBACK.to_json()) | {"colour": "red"}
    assert parse_event(json.dumps(written)) == FEEDBACK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"schema":1}',
        '{"schema":1,"type":"unknown","at":1}',
        FEEDBACK.to_json().replace('"rating"', '"applause"'),
        EXCHANGE.to_json().replace('"turn":2', '"turn":"later"'),
        EXCHANGE.to_json()[:-20],
    ],
)
def test_what_is_none_of_ours_is_a_validation_error(text: str) -> None:
    with pytest.raises(ValidationError):
        parse_event(text)


@pytest.mark.parametrize("model", [Message, SamplingUsed, ExchangeContent, FeedbackContent, Exchange, Feedback])
def test_what_a_person_said_is_not_in_the_words_of_an_error(model: type[BaseModel]) -> None:
    """A traceback goes into the log."""
    with pytest.raises(ValidationError) as raised:
        model.model_validate(dict.fromkeys(model.model_fields, "MARKER-of-a-person"))
    assert "MARKER" not in str(raised.value)


def test_no_event_is_quoted_where_it_cannot_be_read() -> None:
    with pytest.raises(ValidationError) as raised:
        parse_event(EXCHANGE.to_json().replace('"turn":2', '"turn":"MARKER-of-a-person"'))
    assert "MARKER" not in str(raised.value)


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FEEDBACK.value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "full"),
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"temperature": 0.0}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 5}, False),
        ({"min_p": 0.1}, False),
    ],
)
def test_experience_needs_every_token_to_have_been_possible(change: dict[str, float], full: bool) -> None:
    assert SAMPLING.model_copy(update=change).full_support is full


def test_a_release_is_read_back_the_same() -> None:
    change = ReleaseChange(generation=4, at=1.0, action="promote", by="operator", current=3, reason="better")
    release = Release(generation=4, current=3, last_good=2, approved=(2, 3), changes=(change,))
    text = release.model_dump_json(by_alias=True)
    assert json.loads(text)["schema"] == SCHEMA
    assert Release.model_validate_json(text) == release
