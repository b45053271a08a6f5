"""From the bytes of a request to its schema, or to one precise sentence about what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from feedback.events import KINDS
from serving.errors import BadRequest, HeedError, TooSlow

T = TypeVar("T")

BODY_WAIT_S = 20.0
"""How long a body may take to arrive: a client that stops halfway must not hold up a shutdown."""
_SHOWN_CHARS = 80


def read_as(
    shape: TypeAdapter[T], malformed: type[HeedError], *, empty: bytes = b""
) -> Callable[[Request], Awaitable[T]]:
    """A dependency that reads the body as JSON of this shape.

    It raises BadRequest where the body is no JSON, and `malformed` where it is JSON of another shape. `empty` stands
    for a body that was left out.
    """

    async def read(request: Request) -> T:
        try:
            body = await asyncio.wait_for(request.body(), BODY_WAIT_S)
        except TimeoutError:
            raise TooSlow(f"The body did not come within {BODY_WAIT_S:.0f} s.") from None
        except ClientDisconnect:
            raise BadRequest("The client left before its body was whole.") from None
        if body:
            _check_content_type(request.headers.get("content-type", ""))
        try:
            return shape.validate_json(body or empty)
        except ValidationError as error:
            raise explain(error, malformed) from None

    return read


def _check_content_type(content_type: str) -> None:
    """Only JSON: a web page elsewhere may post text/plain to any address without asking, but not application/json."""
    media = content_type.partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise BadRequest(
            f"The body came as {content_type or 'nothing'!r}; send JSON, with content-type: application/json.",
            code="invalid_content_type",
        )


def explain(error: ValidationError, malformed: type[HeedError]) -> HeedError:
    """The first thing wrong with a body: which parameter, what is allowed, what was sent."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"The body is no JSON: {first['ctx']['error']}.", code="invalid_json")
    param = (
        "kind" if first["type"].startswith("union_tag") else first.get("ctx", {}).get("param") or _path(first["loc"])
    )
    message, code = _sentence(first, param or "The body")
    return malformed(message, param=param or None, code=code)


def _sentence(error: ErrorDetails, name: str) -> tuple[str, str]:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing.", "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"{name} is not a parameter Heed knows; leave it out.", "unknown_parameter"
    if kind == "unsupported":
        return f"{name} {error['msg']}.", "unsupported_parameter"
    if kind == "union_tag_not_found":
        return f"kind is missing; it must be one of {', '.join(KINDS)}.", "missing_required_parameter"
    if kind == "union_tag_invalid":
        return f"kind must be one of {', '.join(KINDS)}, not {context['tag']!r}.", "invalid_value"
    if kind == "rule":
        return f"{name} {error['msg']}.", "invalid_value"
    said = (error["msg"][0].lower() + error["msg"][1:]).replace(" after validation", "")
    sent = "" if kind in ("too_long", "too_short") else f", not {_shown(error['input'])}"
    return f"{name}: {said}{sent}.", "invalid_value"


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content, as OpenAI writes it; without the kind that a feedback body was recognised by."""
    steps = location[1:] if len(location) > 1 and location[0] in KINDS else location
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path.removesuffix(".[key]")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"
