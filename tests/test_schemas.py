"""What is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from serving.errors import BadRequest, HeedError, Unprocessable
from serving.routes.bodies import explain
from serving.schemas import ChatIn, FeedbackIn, PromoteIn, Said

CHAT = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
FEEDBACK: TypeAdapter[Said] = TypeAdapter(FeedbackIn)


def chat(**more: Any) -> ChatIn:
    return ChatIn.model_validate_json(json.dumps(CHAT | more))


def refused(shape: TypeAdapter[Any], body: str | bytes) -> HeedError:
    with pytest.raises(ValidationError) as error:
        shape.validate_json(body)
    return explain(error.value, Unprocessable)


def why(**more: Any) -> HeedError:
    return refused(TypeAdapter(ChatIn), json.dumps(CHAT | more))


def why_not(**feedback: Any) -> HeedError:
    return refused(FEEDBACK, json.dumps(feedback))


NEUTRAL = [
    ("audio", None),
    ("frequency_penalty", 0),
    ("frequency_penalty", 0.0),
    ("function_call", "none"),
    ("functions", []),
    ("modalities", ["text"]),
    ("moderation", None),
    ("parallel_tool_calls", True),
    ("prediction", None),
    ("presence_penalty", 0),
    ("prompt_cache_key", "any"),
    ("prompt_cache_options", None),
    ("prompt_cache_retention", "in_memory"),
    ("reasoning_effort", "none"),
    ("response_format", {"type": "text"}),
    ("safety_identifier", "any"),
    ("service_tier", "auto"),
    ("service_tier", "default"),
    ("tool_choice", "none"),
    ("tools", []),
    ("verbosity", "medium"),
    ("web_search_options", None),
]


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_a_parameter_we_do_not_have_is_let_through_at_its_neutral_value(name: str, value: Any):
    chat(**{name: value})
    chat(**{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("frequency_penalty", 0.5),
        ("frequency_penalty", False),
        ("function_call", "auto"),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("parallel_tool_calls", False),
        ("prediction", {"type": "content", "content": "x"}),
        ("presence_penalty", -1),
        ("prompt_cache_retention", "24h"),
        ("reasoning_effort", "low"),
        ("response_format", {"type": "json_object"}),
        ("service_tier", "flex"),
        ("tool_choice", "auto"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
)
def test_a_parameter_we_do_not_have_is_refused_by_name(name: str, value: Any):
    error = why(**{name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert "not supported" in str(error)


def test_every_parameter_of_the_openai_client_is_known_to_us():
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

    assert set(CompletionCreateParamsStreaming.__annotations__) | {"stream"} <= set(ChatIn.model_fields) | {"timeout"}


def test_a_bias_names_tokens_by_their_ids():
    assert chat(logit_bias={"5": 1, "7": -100}).logit_bias == {"5": 1.0, "7": -100.0}
    for wrong in ({"five": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}):
        assert (why(logit_bias=wrong).param or "").startswith("logit_bias")


def test_a_name_nobody_knows_is_refused():
    assert str(why(temprature=1)) == "temprature is not a parameter Heed knows; leave it out."


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("temperature", 2.1, "temperature"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "1", "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", 1.5, "top_p"),
        ("n", 0, "n"),
        ("n", 17, "n"),
        ("n", True, "n"),
        ("n", 1.0, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("seed", 2**63, "seed"),
        ("seed", 0.5, "seed"),
        ("stop", ["a"] * 5, "stop"),
        ("stop", "", "stop[0]"),
        ("stop", [1], "stop[0]"),
        ("stop", 5, "stop"),
        ("stop", "x" * 257, "stop[0]"),
        ("logprobs", 3, "logprobs"),
        ("top_logprobs", 21, "top_logprobs"),
        ("top_logprobs", 1, "top_logprobs"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("user", "", "user"),
        ("user", 7, "user"),
        ("metadata", {"a": 1}, "metadata.a"),
        ("metadata", {"conversation": ""}, "metadata.conversation"),
        ("metadata", {"conversation": "x" * 257}, "metadata.conversation"),
        ("metadata", {str(number): "" for number in range(17)}, "metadata"),
        ("store", "no", "store"),
        ("heed", {"top_k": -1}, "heed.top_k"),
        ("heed", {"min_p": 2}, "heed.min_p"),
        ("heed", {"beam": 4}, "heed.beam"),
        ("heed", [], "heed"),
        ("model", "", "model"),
        ("messages", [], "messages"),
        ("messages", "hi", "messages"),
        ("messages", ["hi"], "messages[0]"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{"content": "hi"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": None}], "messages[0].content"),
        ("messages", [{"role": "tool", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user", "content": "x", "name": "ann"}], "messages[0].name"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "x", "mood": "x"}], "messages[0].mood"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_path(name: str, value: Any, param: str):
    error = why(**{name: value})
    assert error.param == param
    assert str(error).startswith(param)


def test_a_message_says_what_is_allowed_and_what_was_sent():
    assert str(why(temperature=3)) == "temperature: input should be less than or equal to 2, not 3."
    assert str(why(n="x" * 200)).endswith("….")
    assert "'system', 'developer', 'user' or 'assistant'" in str(why(messages=[{"role": "tool", "content": ""}]))


def test_two_limits_that_differ_are_refused_and_equal_ones_are_one():
    assert why(max_tokens=5, max_completion_tokens=6).param == "max_tokens"
    assert chat(max_tokens=5, max_completion_tokens=5).limit == 5
    assert chat(max_completion_tokens=6).limit == 6
    assert chat().limit is None


def test_text_parts_are_put_together_line_by_line():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).said[0].content == "one\ntwo"


def test_a_reply_can_be_sent_back_as_the_client_dumps_it():
    echoed = {"role": "assistant", "content": "hello", "refusal": None, "annotations": None, "audio": None}
    echoed |= {"function_call": None, "tool_calls": None}
    assert chat(messages=[*CHAT["messages"], echoed]).said[1].role == "assistant"


def test_kept_unless_the_client_says_no():
    assert chat().kept
    assert chat(store=None).kept
    assert chat(store=True).kept
    assert not chat(store=False).kept


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1", b"\xff", b'{"model": "x" "y"}', b'{"model": NaN1}', b"[" * 10_000, b'"\\ud800"'],
)
def test_what_is_no_json_is_a_bad_request_everywhere(body: bytes):
    error = refused(FEEDBACK, body)
    assert isinstance(error, BadRequest)
    assert error.code == "invalid_json"


def test_numbers_that_json_does_not_have_are_refused():
    assert refused(TypeAdapter(ChatIn), json.dumps(CHAT | {"temperature": float("nan")})).param == "temperature"
    assert refused(FEEDBACK, '{"kind":"signal","reply_id":"r","name":"dwell","value":Infinity}').param == "value"


GOOD = [
    {"kind": "thumb", "reply_id": "r", "value": "up"},
    {"kind": "thumb", "reply_id": "r", "value": "down", "aspect": "safety", "user": "ann", "id": "1"},
    {"kind": "rating", "reply_id": "r", "value": 5, "metadata": {"page": "home"}},
    {"kind": "preference", "chosen": "a", "rejected": "b"},
    {"kind": "ranking", "reply_ids": ["a", "b", "c"]},
    {"kind": "correction", "reply_id": "r", "text": "better"},
    {"kind": "comment", "reply_id": "r", "text": "hm"},
    {"kind": "signal", "reply_id": "r", "name": "clicked"},
    {"kind": "signal", "reply_id": "r", "name": "dwell", "value": 3.2},
]


@pytest.mark.parametrize("body", GOOD)
def test_every_kind_of_feedback_is_taken(body: dict[str, Any]):
    assert FEEDBACK.validate_json(json.dumps(body)).kind == body["kind"]


@pytest.mark.parametrize("body", GOOD)
def test_a_field_too_many_is_refused_in_every_kind(body: dict[str, Any]):
    assert why_not(**body, extra=1).param == "extra"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "kind"),
        ({"kind": "like"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"kind": "thumb", "value": "up"}, "reply_id"),
        ({"kind": "thumb", "reply_id": "r", "value": "sideways"}, "value"),
        ({"kind": "thumb", "reply_id": "r", "value": 1}, "value"),
        ({"kind": "thumb", "reply_id": "r", "value": "up", "aspect": "Two words"}, "aspect"),
        ({"kind": "thumb", "reply_id": "", "value": "up"}, "reply_id"),
        ({"kind": "rating", "reply_id": "r", "value": 0}, "value"),
        ({"kind": "rating", "reply_id": "r", "value": 6}, "value"),
        ({"kind": "rating", "reply_id": "r", "value": 4.5}, "value"),
        ({"kind": "rating", "reply_id": "r", "value": "4"}, "value"),
        ({"kind": "rating", "reply_id": "r", "value": True}, "value"),
        ({"kind": "preference", "chosen": "a", "rejected": "a"}, "rejected"),
        ({"kind": "preference", "chosen": "a"}, "rejected"),
        ({"kind": "ranking", "reply_ids": ["a"]}, "reply_ids"),
        ({"kind": "ranking", "reply_ids": ["a", "b", "a"]}, "reply_ids"),
        ({"kind": "ranking", "reply_ids": ["a", 2]}, "reply_ids[1]"),
        ({"kind": "ranking", "reply_ids": [str(number) for number in range(17)]}, "reply_ids"),
        ({"kind": "correction", "reply_id": "r", "text": ""}, "text"),
        ({"kind": "comment", "reply_id": "r", "text": "x" * 100_001}, "text"),
        ({"kind": "signal", "reply_id": "r", "name": "smiled"}, "name"),
        ({"kind": "signal", "reply_id": "r", "name": "dwell"}, "value"),
        ({"kind": "signal", "reply_id": "r", "name": "dwell", "value": -1}, "value"),
        ({"kind": "thumb", "reply_id": "r", "value": "up", "id": ""}, "id"),
        ({"kind": "thumb", "reply_id": "r", "value": "up", "user": "x" * 257}, "user"),
        ({"kind": "thumb", "reply_id": "r", "value": "up", "metadata": {"a": None}}, "metadata.a"),
    ],
)
def test_feedback_that_is_malformed_is_refused_by_field(body: dict[str, Any], param: str):
    error = why_not(**body)
    assert isinstance(error, Unprocessable)
    assert error.param == param


def test_the_kinds_are_listed_for_who_does_not_know_them():
    assert "thumb, rating, preference, ranking, correction, comment, signal" in str(why_not(kind="like"))


@pytest.mark.parametrize(("said", "version"), [("v3", 3), (3, 3), ("v0", 0), (0, 0)])
def test_a_version_is_written_with_or_without_its_v(said: object, version: int):
    assert PromoteIn.model_validate_json(json.dumps({"version": said})).version == version


@pytest.mark.parametrize("said", ["3", "vv3", "v-1", -1, 1.5, True, None, "v٣"])
def test_what_is_no_version_is_refused(said: object):
    assert refused(TypeAdapter(PromoteIn), json.dumps({"version": said})).param == "version"


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatIn.model_fields, "kind", "reply_id", "value", "reply_ids", "text", "chosen", "rejected"])


@given(st.dictionaries(FIELDS, JSON, max_size=6) | JSON)
def test_any_json_is_either_taken_or_refused_in_a_sentence(body: Any):
    for shape in (TypeAdapter(ChatIn), FEEDBACK, TypeAdapter(PromoteIn)):
        try:
            shape.validate_json(json.dumps(body))
        except ValidationError as error:
            told = explain(error, Unprocessable)
            assert str(told).endswith(".")
            assert "\n" not in str(told)
