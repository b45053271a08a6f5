"""The wire contract: what is written to the log, in JSON, with a schema number.

Everything that says something about a person (prompt, reply, token ids, text, user) sits in an event's `content`, so
that erasure can later destroy it as one piece.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA = 1

EXCHANGES = "heed.exchanges"
FEEDBACK = "heed.feedback"
RELEASES = "heed.releases"
TOPICS = (EXCHANGES, FEEDBACK, RELEASES)

KINDS = ("thumb", "rating", "preference", "ranking", "correction", "comment", "signal")
SIGNALS = ("clicked", "copied", "regenerated", "abandoned", "dwell")

Kind = Literal["thumb", "rating", "preference", "ranking", "correction", "comment", "signal"]
FinishReason = Literal["stop", "length", "abort"]
Source = Literal["served", "imported"]


class Event(BaseModel):
    """What every event has: a schema number (a reader parks what is newer than it knows) and a time."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="ignore", hide_input_in_errors=True)

    schema_: int = Field(SCHEMA, alias="schema")
    at: float
    """Seconds since the epoch, by the server's clock."""

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


class Message(BaseModel):
    """One message of a conversation, as the client sent it."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class SamplingUsed(BaseModel):
    """How a reply was sampled: enough to sample it again."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what was added to their logits."""

    @property
    def full_support(self) -> bool:
        """True when every token could have been sampled, so that the reply may serve as experience."""
        whole = self.top_p >= 1 and self.top_k == 0 and self.min_p == 0
        return self.temperature > 0 and whole and not self.bias


class ExchangeContent(BaseModel):
    """What was said. Token ids are what the engine saw and sampled, never a re-tokenisation."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    user: str | None
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    reply: str
    reply_ids: tuple[int, ...]
    """Sampled ids, the end-of-sequence id included where it was sampled."""
    logprobs: tuple[float, ...]
    """log p of each sampled id under the processed distribution it was drawn from: the behaviour policy. None of what
    was imported, which nobody here sampled."""
    raw_logprobs: tuple[float, ...]
    """log p of each sampled id at T=1 under the full softmax."""
    metadata: dict[str, str] = Field(default_factory=dict)


class Exchange(Event):
    """One served turn: all that learning needs, exactly as it was."""

    type: Literal["exchange"] = "exchange"
    id: str
    """The reply id, `<completion id>` or `<completion id>:<i>` for choice i > 0."""
    policy: str
    version: int
    """The adapter version that every token of the reply came from; 0 is the base."""
    base: str
    """Fingerprint of the base model, tokenizer and chat template."""
    caller: str
    conversation: str
    turn: int
    finish_reason: FinishReason
    sampling: SamplingUsed
    ask: bool = False
    """True when this reply was drawn for the unbiased slice of which feedback is asked."""
    source: Source = "served"
    """`imported`: said elsewhere, before Heed; `version` is then 0 and stands for nobody."""
    content: ExchangeContent

    @property
    def live(self) -> bool:
        """True when a version of ours said it: only then does it say anything of that version, or may be experience."""
        return self.source == "served"


class FeedbackContent(BaseModel):
    """Who said it, and any words of theirs."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    user: str | None = None
    text: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class Feedback(Event):
    """What a person said of one reply or several. `reply_ids` runs from best to worst where there is an order."""

    type: Literal["feedback"] = "feedback"
    id: str
    caller: str
    kind: Kind
    reply_ids: tuple[str, ...]
    """thumb, rating, correction, comment, signal: one. preference: (chosen, rejected). ranking: best … worst."""
    aspect: str = "overall"
    value: float | None = None
    """thumb: 1 up, 0 down. rating: 1 to 5. signal: seconds for `dwell`, else optional."""
    signal: str | None = None
    body: str = ""
    """Digest of the request's body: the same id with another digest is a `conflict`."""
    content: FeedbackContent


class Retraction(Event):
    """The feedback of this id stops counting."""

    type: Literal["retraction"] = "retraction"
    id: str
    caller: str


class ReleaseChange(BaseModel):
    """One entry of the release's history: who did what, and why."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    generation: int
    at: float
    action: Literal["promote", "rollback", "pause", "resume", "candidate", "withdraw"]
    by: Literal["learner", "operator"]
    current: int
    candidate: int | None = None
    reason: str = ""


class Release(BaseModel):
    """What is served now. The one mutable file of the adapter store; its generation only grows."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_: int = Field(SCHEMA, alias="schema")
    policy: str = "default"
    generation: int = 0
    current: int = 0
    last_good: int = 0
    """The version served before the current one: where a rollback goes."""
    candidate: int | None = None
    share: float = 0.0
    paused: bool = False
    approved: tuple[int, ...] = ()
    """Versions that passed the gate or were promoted by hand: the ones a pin may name."""
    changes: tuple[ReleaseChange, ...] = ()
    """The last 100 changes, oldest first."""


LogEvent = Annotated[Exchange | Feedback | Retraction, Field(discriminator="type")]
_EVENT: TypeAdapter[Exchange | Feedback | Retraction] = TypeAdapter(
    LogEvent, config=ConfigDict(hide_input_in_errors=True)
)


class NewerSchema(ValueError):
    """An event was written by a newer Heed than this one: park it, count it, go on."""


def parse_event(text: str | bytes) -> Exchange | Feedback | Retraction:
    """An event of `heed.exchanges` or `heed.feedback` from its JSON.

    Raises NewerSchema when it was written by a newer Heed, pydantic.ValidationError when it is none of ours.
    """
    peek = _Peek.model_validate_json(text)
    if peek.schema_ > SCHEMA:
        raise NewerSchema(f"event has schema {peek.schema_}; this Heed reads up to {SCHEMA}. Upgrade Heed to read it.")
    return _EVENT.validate_json(text)


class _Peek(BaseModel):
    schema_: int = Field(alias="schema")
