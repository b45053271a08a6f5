"""Chats and models, as an unmodified OpenAI client expects them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import TypeAdapter
from starlette.responses import JSONResponse, Response
from structlog.contextvars import bind_contextvars

from serving.adapters import BadAdapter
from serving.errors import BadRequest, UnknownModel
from serving.routes.answers import EventStream, Json, chunks, whole
from serving.routes.asked import ask
from serving.routes.bodies import read_as
from serving.routes.completion import Completion
from serving.routes.wiring import Asking, Parts, Speaker, Speaking, Wiring, client_of, within_quota
from serving.schemas import ChatIn
from serving.swap import PinRefused

router = APIRouter(dependencies=[Depends(client_of)])

ChatBody = Annotated[ChatIn, Depends(read_as(TypeAdapter(ChatIn), BadRequest))]


@router.post("/v1/chat/completions", response_model=None, dependencies=[Depends(within_quota)])
async def complete(request: Request, body: ChatBody, client: Asking, parts: Parts, speaker: Speaking) -> Response:
    version = await _version_named(body.model, parts, speaker)
    completion = Completion(parts, speaker, await ask(parts, speaker, body, client))
    try:
        completion.start(version)
    except UnknownModel:  # a swap came between, and the version's slot was freed: named again, it is loaded again
        completion.start(await _version_named(body.model, parts, speaker))
    parts.go_on(_cancel_when_gone(request, completion))
    await completion.begun()
    bind_contextvars(version=completion.model)
    headers = {"x-heed-version": completion.model}
    if not body.stream:
        return JSONResponse(await whole(completion, speaker.chat, logprobs=bool(body.logprobs)), headers=headers)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return EventStream(chunks(completion, speaker.chat, logprobs=bool(body.logprobs), usage=usage), headers)


@router.get("/v1/models")
async def models(parts: Parts, speaker: Speaking) -> Json:
    return {"object": "list", "data": await asyncio.to_thread(_models, parts, speaker)}


@router.get("/v1/models/{model:path}")
async def model(model: str, parts: Parts, speaker: Speaking) -> Json:
    known = {entry["id"]: entry for entry in await asyncio.to_thread(_models, parts, speaker)}
    if model not in known:
        raise _unknown(model, known)
    return known[model]


async def _cancel_when_gone(request: Request, completion: Completion) -> None:
    """A client counts as gone when it left, and when it has its answer; then there is nothing left to cancel."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    completion.cancel()


async def _version_named(model: str, parts: Wiring, speaker: Speaker) -> int | None:
    """The version a model name pins; None for the one that is current. Raises UnknownModel."""
    policy, base = parts.store.policy, parts.base_name
    if model == policy:
        return None
    if model == base:
        return 0
    pin = re.fullmatch(rf"{re.escape(policy)}@v(0|[1-9]\d{{0,11}})", model, re.ASCII)
    if pin is None:
        raise _unknown(model, [policy, f"{policy}@v<number>", base])
    try:
        await asyncio.to_thread(speaker.swapper.ensure, int(pin[1]))
    except PinRefused as error:
        raise UnknownModel(f"The model {model} cannot be served: {error}", param="model") from error
    return int(pin[1])


def _unknown(model: str, known: Iterable[str]) -> UnknownModel:
    return UnknownModel(f"There is no model {model[:100]!r} here; there are: {', '.join(known)}.", param="model")


def _models(parts: Wiring, speaker: Speaker) -> list[Json]:
    """The base, the policy's alias, and each version now loaded."""
    store, base = parts.store, parts.base_name
    started = int(parts.started)
    current = speaker.engine.current
    entries = [_entry(base, started, root=base, parent=None)]
    entries.append(_entry(store.policy, started, root=base, parent=f"{store.policy}@v{current}"))
    for version in sorted(speaker.engine.loaded()):
        created, parent = (started, base) if version == 0 else _origin(parts, version)
        entries.append(_entry(f"{store.policy}@v{version}", created, root=base, parent=parent))
    return entries


def _origin(parts: Wiring, version: int) -> tuple[int, str]:
    """When a version was made, and from which; what speaks may have left the store meanwhile."""
    try:
        manifest = parts.store.manifest(version)
    except (BadAdapter, OSError):
        return int(parts.started), parts.base_name
    return int(manifest.created), f"{parts.store.policy}@v{manifest.parent}"


def _entry(name: str, created: int, *, root: str, parent: str | None) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "heed", "root": root, "parent": parent}
