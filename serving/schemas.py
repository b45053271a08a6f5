"""Requests under OpenAI's names, checked strictly: what Heed does not do is refused by name, never silently ignored.

Accepted without effect, because they change no reply: `prompt_cache_key` and `safety_identifier`, which are hints.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from feedback.events import Message
from serving.ids import MAX_CHOICES

MAX_BODY_BYTES = 4 << 20
MAX_MESSAGES = 2048
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TEXT_CHARS = 100_000
"""Of a correction or a comment."""
MAX_RANKED = 16

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""A user, a conversation, an idempotency key."""
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
ReplyName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Aspect = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]


class Strict(BaseModel):
    """JSON taken at its word: no string becomes a number, no name is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def only(*neutral: object) -> BeforeValidator:
    """A parameter of OpenAI's that Heed does not have: null and the value that changes nothing are let through."""
    shown = " or ".join(json.dumps(one) for one in (None, *neutral))

    def check(value: object) -> object:
        # True == 1 in Python and not in JSON
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return value
        raise PydanticCustomError(
            "unsupported", "is not supported by Heed; leave it out or send {shown}", {"shown": shown}
        )

    return BeforeValidator(check)


def _rule(message: str, param: str | None = None) -> PydanticCustomError:
    """A rule of Heed's that was broken; `param` where it is the rule of a whole body, about one of its parameters."""
    return PydanticCustomError("rule", "{message}", {"message": message, "param": param})


def _text_of(content: object) -> object:
    """The text of a message: a string as it is, text parts put together line by line."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            said = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _rule(
                f'has {said!r} as part {number}; Heed reads parts {{"type": "text", "text": "…"}} and no others'
            )
    return "\n".join(part["text"] for part in content)


class MessageIn(Strict):
    """One message. What clients send along when they echo a reply (`refusal`, `annotations` …) may be empty only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class HeedIn(Strict):
    """What OpenAI's chat does not have."""

    top_k: int = Field(0, ge=0, le=1_000_000, description="Sample from the k likeliest tokens; 0: from all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Sample from tokens at least this share as likely as the likeliest."
    )
    ignore_eos: bool = Field(False, description="Go on to max_tokens whatever the model says.")


def _stops(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
MetaKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetaValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetaKey, MetaValue], Field(max_length=16)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
"""A token's id, as the name of a JSON object's member."""
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class ChatIn(Strict):
    """The body of POST /v1/chat/completions."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    messages: Annotated[list[MessageIn], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[list[Stop], BeforeValidator(_stops), Field(max_length=MAX_STOPS)] = []
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Name | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    heed: HeedIn | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    audio: Annotated[Any, only()] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    function_call: Annotated[Any, only("none")] = None
    functions: Annotated[Any, only([])] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    parallel_tool_calls: Annotated[Any, only(True)] = None
    prediction: Annotated[Any, only()] = None
    presence_penalty: Annotated[Any, only(0)] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    tool_choice: Annotated[Any, only("none")] = None
    tools: Annotated[Any, only([])] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatIn:
        if self.stream_options is not None and not self.stream:
            raise _rule("is only allowed with stream: true", "stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise _rule("is only allowed with logprobs: true", "top_logprobs")
        if None not in (self.max_tokens, limit := self.max_completion_tokens) and self.max_tokens != limit:
            raise _rule("and max_completion_tokens mean the same and differ; send one of them", "max_tokens")
        conversation = (self.metadata or {}).get("conversation")
        if conversation is not None and not 1 <= len(conversation) <= 256:
            raise _rule("must have 1 to 256 characters", "metadata.conversation")
        return self

    @property
    def said(self) -> tuple[Message, ...]:
        return tuple(Message(role=message.role, content=message.content) for message in self.messages)

    @property
    def kept(self) -> bool:
        """OpenAI keeps nothing unless asked; Heed learns from what it keeps, so here `store: false` says no."""
        return self.store is not False

    @property
    def limit(self) -> int | None:
        """The most tokens of a reply, where the client says one."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


class _Feedback(Strict):
    id: Name | None = Field(None, description="Idempotency key, scoped to the caller.")
    user: Name | None = Field(None, description="The rater.")
    metadata: Metadata | None = None


class Thumb(_Feedback):
    kind: Literal["thumb"]
    reply_id: ReplyName
    value: Literal["up", "down"]
    aspect: Aspect = "overall"


class Rating(_Feedback):
    kind: Literal["rating"]
    reply_id: ReplyName
    value: Annotated[int, Field(ge=1, le=5)]
    aspect: Aspect = "overall"


class Preference(_Feedback):
    kind: Literal["preference"]
    chosen: ReplyName
    rejected: ReplyName

    @model_validator(mode="after")
    def _two_replies(self) -> Preference:
        if self.chosen == self.rejected:
            raise _rule("must be another reply than chosen", "rejected")
        return self


def _each_once(replies: list[str]) -> list[str]:
    twice = {reply for reply in replies if replies.count(reply) > 1}
    if twice:
        raise _rule(f"must name each reply once; {min(twice)} is there more than once")
    return replies


class Ranking(_Feedback):
    kind: Literal["ranking"]
    reply_ids: Annotated[list[ReplyName], Field(min_length=2, max_length=MAX_RANKED), AfterValidator(_each_once)]


class Correction(_Feedback):
    kind: Literal["correction"]
    reply_id: ReplyName
    text: Text


class Comment(_Feedback):
    kind: Literal["comment"]
    reply_id: ReplyName
    text: Text


class Signal(_Feedback):
    kind: Literal["signal"]
    reply_id: ReplyName
    name: Literal["clicked", "copied", "regenerated", "abandoned", "dwell"]
    value: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None

    @model_validator(mode="after")
    def _dwell_has_seconds(self) -> Signal:
        if self.name == "dwell" and (self.value is None or self.value < 0):
            raise _rule("must be the seconds, 0 or more, of a dwell", "value")
        return self


Said = Thumb | Rating | Preference | Ranking | Correction | Comment | Signal
FeedbackIn = Annotated[Said, Field(discriminator="kind")]
"""The body of POST /v1/feedback."""


class Because(Strict):
    """The body of an admin command; it may be left out."""

    reason: Annotated[str, StringConstraints(max_length=500)] = ""


def _version_number(value: object) -> object:
    if isinstance(value, str) and value.startswith("v") and value[1:].isascii() and value[1:].isdecimal():
        return int(value[1:])
    return value


VersionNumber = Annotated[int, BeforeValidator(_version_number), Field(ge=0, le=10**12)]


class PromoteIn(Because):
    version: VersionNumber = Field(description='As "v3" or 3; 0 is the base.')
