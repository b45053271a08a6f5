"""The web application: its parts put together, its errors in OpenAI's shape. Importing this starts nothing."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from feedback.board import RELEASE_HINT, Board
from feedback.log import Log
from serving.adapters import AdapterStore
from serving.config import ServingConfig
from serving.errors import BadRequest, HeedError, MethodNotAllowed, NotFound
from serving.ids import Ids
from serving.keys import Keys
from serving.metrics import Metrics, Now, role_of
from serving.model import BUILT_IN
from serving.routes import admin, chat, feedback, operations, policy
from serving.routes.door import Door
from serving.routes.wiring import Speaker, Wiring
from serving.swap import SwapReport
from serving.vllm_metrics import VllmMetrics

if TYPE_CHECKING:
    from serving.traces import Traces

HINT_WAIT_S = 5.0
"""After which a connection that broke while waiting for a hint is made again."""


def create_app(
    config: ServingConfig,
    *,
    ids: Ids,
    log: Log,
    board: Board,
    store: AdapterStore,
    keys: Keys | None = None,
    traces: Traces | None = None,
    speaker: Speaker | None = None,
) -> FastAPI:
    """An application over these parts, which the caller opened and will close.

    Without `keys` everyone is answered, without `traces` nothing is traced. Without a `speaker` (engine, chat, base,
    swapper) it answers all but chats; give it one later as `app.state.wiring.speaker`, when the model is loaded.
    """
    wiring = Wiring(
        config=config,
        ids=ids,
        log=log,
        board=board,
        store=store,
        metrics=Metrics(store.policy),
        base_name=base_name(config.model),
        keys=keys,
        traces=traces,
        speaker=speaker,
    )
    look = partial(_now, wiring)
    wiring.metrics.watch(look)
    if config.vllm_metrics:
        wiring.metrics.registry.register(VllmMetrics(wiring.metrics, look))
    app = FastAPI(title="Heed", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.wiring = wiring
    app.add_route(feedback.GIVE, feedback.give, methods=["POST"])
    for module in (chat, feedback, policy, operations):
        app.include_router(module.router)
    if config.admin_token is not None:
        app.include_router(admin.router)
    app.mount("/static", _Page(directory=operations.STATIC, check_dir=False), name="static")
    app.add_middleware(Door, parts=wiring)
    for kind in (HeedError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _told)
    return app


class _Page(StaticFiles):
    """Files that browsers ask about again each time, so that a page is never half of one Heed and half of another."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers["cache-control"] = "no-cache"
        return response


def base_name(model: str | None) -> str:
    """How clients name the base: a hub id as it is, a directory by its last part."""
    if model is None:
        return BUILT_IN
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def on_swap(wiring: Wiring, report: SwapReport) -> None:
    """Count a swap; note on the board when a version is first served."""
    metrics = wiring.metrics
    for phase, seconds in report.seconds.items():
        metrics.swap_seconds.labels(phase).observe(seconds)
    if report.outcome != "drained":
        metrics.swaps.labels(report.outcome).inc()
    if report.outcome == "activated":
        wiring.go_on_in_loop(partial(wiring.board.activated, report.version, time.time()))


async def follow_hints(wiring: Wiring) -> None:
    """For as long as the server lives: look at the release as soon as somebody says that it was changed."""
    while True:
        if await wiring.board.wait_for_hint(RELEASE_HINT, HINT_WAIT_S) and wiring.speaker is not None:
            wiring.speaker.swapper.look_soon()


def _now(wiring: Wiring) -> Now:
    """What a scrape sees."""
    outbox = wiring.log.waiting()
    if wiring.speaker is None:
        return Now(
            False, running=0, waiting=0, prompt_tokens=0, prefix_tokens=0, kv_usage=0.0, loaded={}, outbox=outbox
        )
    engine, release = wiring.speaker.engine, wiring.release()
    stats = engine.stats()
    return Now(
        ready=wiring.ready,
        running=stats.running,
        waiting=stats.waiting,
        prompt_tokens=stats.prompt_tokens,
        prefix_tokens=stats.prefix_tokens,
        kv_usage=stats.kv_used / stats.kv_capacity,
        loaded={version: role_of(version, release) for version in engine.loaded()},
        previous=release.last_good,
        rows=stats.rows,
        slots=stats.slots,
        free_slots=stats.free_slots,
        outbox=outbox,
    )


async def _told(request: Request, error: Exception) -> Response:
    """The one place where an error, ours or the framework's, becomes a response."""
    if isinstance(error, HeedError):
        return JSONResponse(error.body(), error.status, headers=error.headers())
    ours = _ours(request, error)
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse(ours.body(), ours.status, headers=headers)


def _ours(request: Request, error: Exception) -> HeedError:
    route = f"{request.method} {request.url.path[:200]}"
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return BadRequest(f"{first['loc'][-1]}: {first['msg']}.", param=str(first["loc"][-1]))
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return MethodNotAllowed(
            f"{route} is not allowed; this route takes {(error.headers or {}).get('Allow', 'others')}."
        )
    if error.status_code == 404:
        return NotFound(f"There is no {route} here.")
    return BadRequest(str(error.detail))
