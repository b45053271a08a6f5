"""One past chat with what was said of it, from a row in TRL's column names.

    prompt + completion [+ label | rating]          a reply, and perhaps a judgement of it
    [prompt +] chosen + rejected                    two replies to one prompt, the first preferred

https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from deploy.rows import Values
from feedback.events import Message
from serving.errors import HeedError
from serving.routes.bodies import explain
from serving.schemas import MessageIn

MEANT = ("prompt", "completion", "label", "rating", "chosen", "rejected")
ABOUT = ("user", "at", "id", "aspect", "conversation")
EXPORTED = (
    "reply_id", "rejected_id", "version", "rejected_version", "status", "reason", "turn", "source", "finish_reason"
)  # fmt: skip
"""What an export says beside: read for whether it is known already, or passed over."""
COLUMNS = frozenset((*MEANT, *ABOUT, *EXPORTED))

_LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "up": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0, "down": 0.0}
_ASPECT = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_DAY_S = 86_400.0
_messages: TypeAdapter[list[MessageIn]] = TypeAdapter(list[MessageIn])


class BadLine(ValueError):
    """A row that cannot be taken; the message says which column, what is wrong, and what is allowed."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"{column} {problem}".strip())
        self.column = column


@dataclass(frozen=True, slots=True)
class Past:
    """A prompt, one reply (or two, the better one first), and what somebody said of it."""

    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    kind: Literal["thumb", "rating", "preference"] | None
    value: float | None
    aspect: str
    user: str | None
    conversation: str | None
    at: float | None
    """Seconds since the epoch, where it is known."""
    id: str | None
    """What its giver calls it: one id, one judgement."""

    def content(self) -> bytes:
        """All that it says, in one spelling. Raises BadLine where that is no text."""
        said = [[message.role, message.content] for message in self.prompt]
        about = [self.kind, self.value, self.aspect, self.user, self.conversation, self.at]
        try:
            return json.dumps([said, self.replies, about, self.id], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadLine("line", "holds what is no UTF-8 text") from None


def read_past(values: Values, now: float) -> Past:
    """What a row says. `now`, in epoch seconds: nothing was said later. Raises BadLine."""
    kind, value = _judgement(values)
    prompt, replies = _pair(values) if kind == "preference" else _single(values)
    aspect = str(values.get("aspect", "overall"))
    if not _ASPECT.fullmatch(aspect):
        raise BadLine("aspect", f"must be a lower-case word of 1 to 40 letters, digits, - and _, not {_shown(aspect)}")
    if kind == "preference" and aspect != "overall":
        raise BadLine("aspect", "goes with label or rating; a preference has none")
    return Past(
        prompt=prompt,
        replies=replies,
        kind=kind,
        value=value,
        aspect=aspect,
        user=_name(values, "user"),
        conversation=_name(values, "conversation"),
        at=_at(values["at"], now) if "at" in values else None,
        id=_name(values, "id"),
    )


def _judgement(values: Values) -> tuple[Literal["thumb", "rating", "preference"] | None, float | None]:
    given = [name for name in ("label", "rating") if name in values]
    if "chosen" in values or "rejected" in values:
        if others := [name for name in ("completion", *given) if name in values]:
            raise BadLine(others[0], "does not go with chosen and rejected: put it on a line of its own")
        return "preference", None
    if len(given) == 2:
        raise BadLine("rating", "does not go with label: of one reply and aspect one of the two counts; keep that one")
    if "label" in values:
        return "thumb", _label(values["label"])
    return ("rating", _rating(values["rating"])) if "rating" in values else (None, None)


def _single(values: Values) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    prompt = _prompt(_needed(values, "prompt"))
    return prompt, (_reply(_needed(values, "completion"), "completion", prompt),)


def _pair(values: Values) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    chosen, rejected = _needed(values, "chosen"), _needed(values, "rejected")
    prompt = _prompt(values["prompt"]) if "prompt" in values else _shared(chosen, rejected)
    replies = _reply(chosen, "chosen", prompt), _reply(rejected, "rejected", prompt)
    if replies[0] == replies[1]:
        raise BadLine("rejected", "must be another reply than chosen")
    return prompt, replies


def _needed(values: Values, column: str) -> object:
    if column not in values:
        raise BadLine(
            column,
            "is missing; a line has prompt, completion and perhaps label or rating, or else prompt, chosen and rejected",
        )
    return values[column]


def _prompt(value: object) -> tuple[Message, ...]:
    found = _text_or_messages(value, "prompt")
    prompt = (Message(role="user", content=found),) if isinstance(found, str) else tuple(found)
    if not prompt or found == "":
        raise BadLine("prompt", "is empty; it must be a text or a list of messages")
    return prompt


def _shared(chosen: object, rejected: object) -> tuple[Message, ...]:
    """TRL's implicit prompt: the beginning that two conversations share."""
    one, other = _text_or_messages(chosen, "chosen"), _text_or_messages(rejected, "rejected")
    if isinstance(one, str) or isinstance(other, str):
        raise BadLine("prompt", "is missing; without it chosen and rejected must be whole conversations, as lists")
    same = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    if not same:
        raise BadLine("chosen", "and rejected must begin with the same prompt and differ in the reply")
    return tuple(one[:same])


def _reply(value: object, column: str, prompt: Sequence[Message]) -> str:
    found = _text_or_messages(value, column)
    if isinstance(found, str):
        return found
    own = found[len(prompt) :] if tuple(found[: len(prompt)]) == tuple(prompt) else found
    if len(own) != 1 or own[0].role != "assistant":
        said = ", ".join(message.role for message in own) or "none"
        raise BadLine(column, f"must be a text or a list with one assistant message, not messages by: {said}")
    return own[0].content


def _text_or_messages(value: object, column: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadLine(column, f"must be a text or a list of messages, not {_shown(value)}")
    try:
        found = _messages.validate_json(json.dumps([_without_nothing(message) for message in value], default=str))
    except ValidationError as error:
        raise BadLine(column, str(explain(error, HeedError)).rstrip(".")) from None
    return [Message(role=message.role, content=message.content) for message in found]


def _without_nothing(message: object) -> object:
    """Parquet gives each message all fields that any has."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def _label(value: object) -> float:
    spelled = value.strip() if isinstance(value, str) else str(value) if isinstance(value, bool | int | float) else ""
    if spelled.lower() not in _LABELS:
        raise BadLine("label", f'must be true, false, 1, 0, "up" or "down", not {_shown(value)}')
    return _LABELS[spelled.lower()]


def _rating(value: object) -> float:
    stars = _number(value)
    if stars not in (1, 2, 3, 4, 5):
        raise BadLine("rating", f"must be a whole number from 1 to 5, not {_shown(value)}")
    return stars


def _name(values: Values, column: str) -> str | None:
    value = values.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is one of floats in pandas
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise BadLine(column, f"must be a text of 1 to 256 characters, or a whole number, not {_shown(value)}")
    return value


def _at(value: object, now: float) -> float:
    at = value.replace(tzinfo=value.tzinfo or UTC).timestamp() if isinstance(value, datetime) else None
    at = _number(value) if at is None else at
    if at is None and isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            at = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        except (ValueError, OverflowError):
            pass
    if at is None or not 0 <= at <= now + _DAY_S:
        raise BadLine(
            "at", f"must be seconds since 1970 or an ISO 8601 time (UTC where it names no zone), not {_shown(value)}"
        )
    return at


def _number(value: object) -> float | None:
    """The number that a value is or spells; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
