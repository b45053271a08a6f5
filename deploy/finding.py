"""What `heed check` finds of one thing, and what one look leaves for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from learner.config import LearnerConfig

if TYPE_CHECKING:
    from feedback.events import Exchange

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing; `do` is empty where nothing is to be done."""

    name: str
    verdict: Verdict
    says: str
    do: str = ""


@dataclass(slots=True)
class Seen:
    """What is to be looked at, and what was seen already, so that nobody looks or waits for it twice."""

    config: LearnerConfig
    ends: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Topic → the last offset of each partition; empty where the log could not be read."""
    newest: Exchange | None = None
    """The newest exchange of the log that a server of this policy gave."""
    ready: bool = False
    """Whether a server answers chats here."""
    learns: bool = False
    """Whether a learner of this policy is at work somewhere."""
    policy: Mapping[str, Any] | None = None
    """What GET /v1/policy says."""


Look = Callable[[Seen], Iterator[Finding]]
