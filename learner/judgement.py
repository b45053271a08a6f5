"""What one person said of one reply or several, as the learner takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from feedback.events import Message

Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and reply, as token ids: the same reply served twice is one reply."""
LIKED, DISLIKED = 4, 2
"""Stars from which on, and up to which, a rating says yes or no."""


class Tokens(Protocol):
    """A prompt and a reply to it, as token ids."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def reply_ids(self) -> tuple[int, ...]: ...


def key_of(sample: Tokens) -> Key:
    """What tells this reply from others."""
    return sample.prompt_ids, sample.reply_ids


@dataclass(frozen=True, slots=True)
class Words:
    """A reply to these messages, as any base can take it."""

    messages: tuple[Message, ...]
    text: str
    ended: bool = True
    """False when it was cut, and so has no end of its own."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reply as it was served."""

    reply_id: str
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    version: int
    words: Words | None = None
    """Of a reply that another base gave: its token ids are that base's until it is prepared (learner/prepare.py)."""
    live: bool = True
    """A version of ours said it (Exchange.live): who read it could have sent a signal."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One live piece of feedback that the reward model can learn from, on replies of this policy, whatever its base was.

    `value` is 1 or 0 for a thumb, 1 to 5 for a rating, what came with a signal (1 if nothing did), else 1. Of a preference and
    a ranking `reply` is the best and `other` the next; a correction is about `reply` until it is prepared (learner/prepare.py):
    then `reply` is as it should have been, and `other` as it was.
    """

    feedback_id: str
    kind: str
    user: str | None
    value: float
    reply: Sample
    other: Sample | None
    at: float
    aspect: str = "overall"
    signal: str | None = None
    """The signal's name."""
    correction: Words | None = None
    """What the reply should have been."""
    ranked: tuple[Sample, ...] = ()
    """All replies of a ranking, from best to worst."""
    weight: float = 1.0
    """How much it counts beside others of its kind: by its aspect, and a correction by how much it changed, once prepared."""
