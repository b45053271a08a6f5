"""Events as a server writes them, for tests of what reads the log."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from feedback.events import (
    EXCHANGES,
    FEEDBACK,
    Exchange,
    ExchangeContent,
    Feedback,
    FeedbackContent,
    FinishReason,
    Kind,
    Message,
    Retraction,
    SamplingUsed,
    Source,
)
from feedback.log import Record

BASE = "base-fingerprint"
POLICY = "default"
NOW = 1_700_000_000.0


def exchange(
    reply_id: str,
    *,
    base: str = BASE,
    policy: str = POLICY,
    version: int = 0,
    prompt: str = "hello",
    prompt_ids: tuple[int, ...] = (1, 2, 3),
    reply_ids: tuple[int, ...] = (4, 5),
    at: float = NOW,
    source: Source = "served",
    reply: str = "there",
    finish_reason: FinishReason = "stop",
    stop: tuple[str, ...] = (),
) -> Exchange:
    return Exchange(
        at=at,
        source=source,
        id=reply_id,
        policy=policy,
        version=version,
        base=base,
        caller="c",
        conversation="conv-1",
        turn=0,
        finish_reason=finish_reason,
        sampling=SamplingUsed(temperature=1, top_p=1, top_k=0, min_p=0, max_tokens=16, seed=None, stop=stop),
        content=ExchangeContent(
            user="ann",
            messages=(Message(role="user", content=prompt),),
            prompt_ids=prompt_ids,
            reply=reply,
            reply_ids=reply_ids,
            logprobs=(-0.5,) * len(reply_ids),
            raw_logprobs=(-0.5,) * len(reply_ids),
        ),
    )


def feedback(
    feedback_id: str,
    *reply_ids: str,
    kind: Kind = "thumb",
    value: float | None = 1,
    user: str | None = "ann",
    aspect: str = "overall",
    body: str = "",
    at: float = NOW,
    signal: str | None = None,
    text: str | None = None,
) -> Feedback:
    return Feedback(
        at=at,
        id=feedback_id,
        caller="c",
        kind=kind,
        reply_ids=reply_ids,
        aspect=aspect,
        value=value if kind in ("thumb", "rating", "signal") else None,
        signal=signal,
        body=body or f"{kind} {value} {reply_ids}",
        content=FeedbackContent(user=user, text=text),
    )


def retraction(feedback_id: str, at: float = NOW) -> Retraction:
    return Retraction(at=at, id=feedback_id, caller="c")


def records(*events: Exchange | Feedback | Retraction | str, first: int = 1) -> list[Record]:
    """The events as records, each topic numbered from `first`; text is an event of the feedback topic as it stands."""
    numbers = {EXCHANGES: itertools.count(first), FEEDBACK: itertools.count(first)}
    return list(_records(events, numbers))


def _records(
    events: Iterable[Exchange | Feedback | Retraction | str], numbers: dict[str, itertools.count[int]]
) -> Iterable[Record]:
    for event in events:
        topic = EXCHANGES if isinstance(event, Exchange) else FEEDBACK
        text = event if isinstance(event, str) else event.to_json()
        yield Record(topic, topic, next(numbers[topic]), "key", text)
