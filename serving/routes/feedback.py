"""What people say of replies: accepted, followed on its way into a version, taken back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from feedback.board import Story, furthest
from serving.errors import HeedError, Unprocessable
from serving.routes.bodies import read_as
from serving.routes.intake import FeedbackLog, Intake
from serving.routes.wiring import Asking, Parts, client_of, wiring_of, within_quota
from serving.schemas import FeedbackIn, Said

router = APIRouter(dependencies=[Depends(client_of)])

Json = dict[str, Any]

_shape: TypeAdapter[Said] = TypeAdapter(FeedbackIn)
_read = read_as(_shape, Unprocessable)


async def _read_and_count(request: Request) -> Said:
    try:
        return await _read(request)
    except HeedError:
        (await wiring_of(request)).metrics.feedback.labels("unknown", "malformed").inc()
        raise


GIVE = "/v1/feedback"


async def give(request: Request) -> Response:
    """POST /v1/feedback, a route of Starlette's: to have FastAPI resolve what it takes costs as much as all that it does."""
    parts = await wiring_of(request)
    client = await client_of(request, parts, request.headers.get("authorization", ""))
    await within_quota(client, parts)
    said = await _read_and_count(request)
    key, once = (request.headers.get(name) for name in ("idempotency-key", "x-heed-once"))
    receipt = await Intake(parts).accept(said, client, key, once)
    return Response(f'{{"id":"{receipt}","status":"accepted"}}', 202, media_type="application/json")


@router.get("/v1/feedback/{feedback_id}")
async def story(feedback_id: str, client: Asking, parts: Parts, log: FeedbackLog) -> Json:
    parts.ids.verify_feedback(feedback_id, client.key)
    await log.shown(feedback_id)
    steps = await parts.board.story(feedback_id)
    receipt = await parts.board.receipt(feedback_id)
    return {
        "id": feedback_id,
        # an id that proves itself was accepted, even when the board has forgotten the receipt
        "kind": receipt.kind if receipt else None,
        "status": furthest(steps),
        "history": [_step(step) for step in steps],
    }


@router.delete("/v1/feedback/{feedback_id}")
async def retract(feedback_id: str, client: Asking, log: FeedbackLog) -> Json:
    await log.retract(feedback_id, client)
    return {"id": feedback_id, "status": "retracted"}


def _step(step: Story) -> Json:
    told: Json = {"status": step.status, "at": step.at}
    if step.update is not None:
        told["update"] = step.update
    if step.version is not None:
        told["version"] = f"v{step.version}"
    if step.reason is not None:
        told["reason"] = step.reason
    return told
