"""What an operator does by hand. Without an admin token these routes do not exist."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import TypeAdapter

from feedback.board import RELEASE_HINT, WORK_HINT
from feedback.events import Release
from serving.adapters import BadAdapter, ReleaseBroken, ReleaseRefused, StoreBusy
from serving.errors import Conflict, NotFound, Unauthorized, Unavailable, Unprocessable
from serving.release import Action
from serving.routes.bodies import read_as
from serving.routes.policy import summary
from serving.routes.wiring import Parts, Wiring, operates
from serving.schemas import Because, PromoteIn

Json = dict[str, Any]


async def _operator(operating: Annotated[bool, Depends(operates)]) -> None:
    """Raises Unauthorized unless the admin token came with the request."""
    if not operating:
        raise Unauthorized(
            "This route needs the header Authorization: Bearer followed by the token in HEED_ADMIN_TOKEN."
        )


router = APIRouter(prefix="/admin", dependencies=[Depends(_operator)])

Promotion = Annotated[PromoteIn, Depends(read_as(TypeAdapter(PromoteIn), Unprocessable, empty=b"{}"))]
Reason = Annotated[Because, Depends(read_as(TypeAdapter(Because), Unprocessable, empty=b"{}"))]


@router.post("/promote")
async def promote(body: Promotion, parts: Parts) -> Json:
    return await _change(parts, "promote", body.reason, body.version)


@router.post("/rollback")
async def rollback(body: Reason, parts: Parts) -> Json:
    return await _change(parts, "rollback", body.reason)


@router.post("/pause")
async def pause(body: Reason, parts: Parts) -> Json:
    return await _change(parts, "pause", body.reason)


@router.post("/resume")
async def resume(body: Reason, parts: Parts) -> Json:
    return await _change(parts, "resume", body.reason)


@router.post("/update", status_code=202)
async def update(_: Reason, parts: Parts) -> Json:
    await parts.board.ask_update(time.time())
    await parts.board.hint(WORK_HINT)
    return {"status": "asked"}


async def _change(parts: Wiring, action: Action, reason: str, version: int | None = None) -> Json:
    """Change the release and return it; servers follow within a second. Raises NotFound, Conflict, Unavailable."""
    release = await asyncio.to_thread(_changed, parts, action, reason, version)
    await parts.board.hint(RELEASE_HINT)
    return summary(release)


def _changed(parts: Wiring, action: Action, reason: str, version: int | None) -> Release:
    base = parts.speaker.base if parts.speaker else None
    try:
        return parts.store.change(action, "operator", version=version, reason=reason, base=base)
    except BadAdapter as error:
        missing = version not in parts.store.versions()
        raise (NotFound if missing else Conflict)(str(error), param="version") from error
    except ReleaseRefused as error:
        raise Conflict(str(error), code="refused") from error
    except (ReleaseBroken, StoreBusy, OSError) as error:
        raise Unavailable(f"The release was not changed: {error}", retry_after=5) from error
