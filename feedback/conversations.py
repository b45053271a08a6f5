"""Where an exchange stands in its conversation: found by what the prompt goes on from, never by a client's word alone."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from feedback.events import Message


@dataclass(frozen=True, slots=True)
class Place:
    """Where an exchange stands: its conversation, and its turn there, from 0."""

    conversation: str
    turn: int


def new_place(conversation: str | None) -> Place:
    """The first turn of a conversation of this name, or of one that nobody has named."""
    return Place(conversation or "conv-" + secrets.token_hex(12), 0)


def digests_before(caller: str, messages: Sequence[Message], conversation: str | None) -> list[bytes]:
    """Under which digests the place of the exchange that answers this prompt may be found, the likeliest first.

    In a named conversation: that of the same prompt, else of what it continues, else the next of all.
    """
    earlier = _up_to_last_reply(messages)
    if conversation is None:
        return [_digest(caller, None, "after", earlier)] if earlier else []
    return [
        _digest(caller, conversation, "prompt", messages),
        _digest(caller, conversation, "after", earlier),
        _digest(caller, conversation, "last", ()),
    ]


def places_after(caller: str, messages: Sequence[Message], reply: str, place: Place) -> dict[bytes, Place]:
    """Digest → place, for the exchanges that may follow the one in which `reply` answered `messages` at `place`."""
    after = (*messages, Message(role="assistant", content=reply))
    named, following = place.conversation, Place(place.conversation, place.turn + 1)
    return {
        _digest(caller, None, "after", after): following,
        _digest(caller, named, "after", after): following,
        _digest(caller, named, "prompt", messages): place,
        _digest(caller, named, "last", ()): following,
    }


def _up_to_last_reply(messages: Sequence[Message]) -> Sequence[Message]:
    """The prompt that an earlier exchange left behind: everything up to the last assistant message, or nothing."""
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    return messages[: ends[-1]] if ends else ()


def _digest(caller: str, conversation: str | None, what: str, messages: Sequence[Message]) -> bytes:
    """Key of a place. System messages are left out: many clients write the time into them."""
    said = [[message.role, message.content.strip()] for message in messages if message.role in ("user", "assistant")]
    text = json.dumps([caller, conversation, what, said])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
