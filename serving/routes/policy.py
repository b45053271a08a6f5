"""What is served now and why, and what was said: the policy, and single replies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from feedback.events import Release
from serving.errors import UnknownReply
from serving.routes.wiring import Parts, Wiring, reader_of

router = APIRouter(dependencies=[Depends(reader_of)])

Json = dict[str, Any]

NO_LEARNER = (
    "no learner has been seen on this data folder, so feedback is kept and nothing is learned; "
    "start one with `heed learn`, or server and learner together with `heed up`"
)


@router.get("/v1/policy")
async def policy(parts: Parts) -> Json:
    report, activations = await asyncio.gather(parts.board.report("policy"), parts.board.activations())
    return await asyncio.to_thread(_policy, parts, report, activations)


@router.get("/v1/replies/{reply_id}")
async def reply(reply_id: str, reader: Annotated[str | None, Depends(reader_of)], parts: Parts) -> Response:
    parts.ids.verify_reply(reply_id, reader)
    exchange = await parts.board.get_exchange(reply_id)
    if exchange is None:
        raise UnknownReply(
            f"The reply {reply_id} is no longer at hand: only the newest are kept ready. It can still be rated.",
            code="reply_forgotten",
        )
    return Response(exchange, media_type="application/json")


def summary(release: Release) -> Json:
    """The release, for people and programs."""
    candidate = release.candidate
    return {
        "policy": release.policy,
        "current": f"v{release.current}",
        "last_good": f"v{release.last_good}",
        "candidate": None if candidate is None else f"v{candidate}",
        "share": release.share,
        "paused": release.paused,
        "generation": release.generation,
    }


def _policy(parts: Wiring, report: str | None, activations: Mapping[int, float]) -> Json:
    """The release as it is now, with what the learner last reported."""
    speaker = parts.speaker
    learned: Json = {"why": NO_LEARNER} if report is None else json.loads(report)
    nothing: Json = {
        "last_update": None,
        "gate": None,
        "freshness": {"p50": None, "p95": None, "count": 0},
        "feedback": {"by_kind": {}, "dropped": {}},
        "liked": {},
        "seen_at": None,
    }
    return {
        **nothing,
        **learned,
        **summary(parts.release()),
        "base": parts.base_name,
        "speaking": None if speaker is None else f"v{speaker.engine.current}",
        "loaded": [] if speaker is None else [f"v{version}" for version in sorted(speaker.engine.loaded())],
        "activated": {f"v{version}": at for version, at in sorted(activations.items())},
        "problem": parts.store.release_problem or (speaker.swapper.problem if speaker else None),
    }
