"""For those who run a server: alive, ready, which build, and what it counts. And the page at /."""

from __future__ import annotations

import asyncio
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import FileResponse, Response

from serving.errors import NotFound, Unavailable
from serving.routes.wiring import Parts

router = APIRouter()

Json = dict[str, Any]

STATIC = Path(__file__).resolve().parent.parent / "static"


@router.get("/health")
async def health() -> Json:
    return {"status": "alive"}


@router.get("/ready")
async def ready(parts: Parts) -> Json:
    if parts.draining:
        raise Unavailable("The server is stopping; send new chats elsewhere.", code="draining", retry_after=1)
    if parts.speaker is None:
        raise Unavailable("The model is still being loaded.", code="loading", retry_after=1)
    return {"status": "ready"}


@router.get("/version")
async def build(parts: Parts) -> Json:
    return {"version": _installed("heed"), "python": platform.python_version(), "base": parts.base_name} | {
        name: _installed(name) for name in ("torch", "transformers", "peft", "fastapi", "uvicorn")
    }


@router.get("/metrics")
async def metrics(parts: Parts) -> Response:
    text = await asyncio.to_thread(generate_latest, parts.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/prompts.json")
async def prompts(parts: Parts) -> list[Any]:
    """Prompts that the model knows, for the page to suggest: those lying beside it, if any."""
    if parts.speaker is None:
        return []
    return await asyncio.to_thread(_read_prompts, parts.speaker.folder / "prompts.json")


@router.get("/")
async def page() -> Response:
    if not (STATIC / "index.html").is_file():
        raise NotFound("This build comes without the page.")
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


def _read_prompts(path: Path) -> list[Any]:
    try:
        suggested = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return suggested if isinstance(suggested, list) else []


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
