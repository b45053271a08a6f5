"""What happens to every request on its way: an id, a bounded body, a count, a line, and a goodbye while the server drains."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from random import getrandbits

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from serving.errors import HeedError, TooLarge
from serving.routes.feedback import GIVE
from serving.routes.wiring import Wiring
from serving.schemas import MAX_BODY_BYTES

SHORT_BODY_BYTES = 1 << 16
"""What comes in a moment, and costs less to pass over than a new connection would."""

QUIET = re.compile(r"/(health|ready|metrics|static/.*)?")
"""Paths that machines ask for again and again, and the page: told of at level debug, and never traced."""
_SANE_ID = re.compile(r"[!-~]{1,128}")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
OTHER_METHOD = "_OTHER"
"""Stands for every other word that a client puts there, as in OpenTelemetry's conventions for HTTP."""

_log = logging.getLogger(__name__)
_access = logging.getLogger("serving.access")


class Visit:
    """One request, from its arrival to its last byte."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        self.status = 0
        """Of its answer; 0 before there is one."""
        given = self.headers.get("x-request-id", "")
        self.id = given if _SANE_ID.fullmatch(given) else f"req_{getrandbits(128):032x}"
        """The client's own where it sent one that can stand in a line of a log."""
        self.quiet = QUIET.fullmatch(scope["path"]) is not None

    @property
    def route(self) -> str:
        """The template of its path: of a path itself there is no end, and it may name a user."""
        # the one route that is not FastAPI's own is not named in the scope
        plain = GIVE if self.scope["path"] == GIVE else ""
        return plain or getattr(self.scope.get("route"), "path", "") or self.scope.get("root_path") or "other"


class Door:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, parts: Wiring) -> None:
        self._app = app
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(scope)
        bounded = _Bounded(visit.headers, receive)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", visit.id.encode())]
                # a stranger's long body is not even waited for
                if self._parts.draining or (visit.status == 401 and bounded.long):
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        with self._told(visit):
            try:
                await self._app(scope, bounded, answer)
            except Exception:  # a defect: nobody above would say so in our shape
                if visit.status:
                    raise  # an answer that was begun is cut off, so that nobody takes it for whole
                _log.exception("%s %s failed", visit.method, visit.route)
                failed = HeedError("The server failed on this request; its log says how. Trying again may help.")
                await JSONResponse(failed.body(), failed.status)(scope, receive, answer)

    @contextmanager
    def _told(self, visit: Visit) -> Iterator[None]:
        """Name the request to the log and to traces while it lasts; then count it, and say how it went."""
        began, traces = time.monotonic(), self._parts.traces
        clear_contextvars()  # a request that came right behind another begins with what was bound in that one
        bind_contextvars(request_id=visit.id)
        with nullcontext() if traces is None or visit.quiet else traces.request(visit):
            try:
                yield
            finally:
                seconds = time.monotonic() - began
                self._parts.metrics.answered(visit.route, visit.status, seconds)
                level = logging.WARNING if visit.status >= 500 else logging.INFO
                told = {"method": visit.method, "route": visit.route, "status": visit.status}
                told |= {"seconds": round(seconds, 4)}
                _access.log(logging.DEBUG if visit.quiet else level, "answered", extra=told)


class _Bounded:
    """Reads a request's body up to the limit. Raises TooLarge beyond, or at once where the length is announced."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        announced = headers.get("content-length", "")
        self._bytes = int(announced) if announced.isdecimal() else 0
        self._announced = bool(self._bytes)
        self.long = self._bytes > SHORT_BODY_BYTES or "transfer-encoding" in headers
        """True for a body that is long, or may be."""
        self._receive = receive

    async def __call__(self) -> Message:
        self._check()
        message = await self._receive()
        if not self._announced and message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._check()
        return message

    def _check(self) -> None:
        if self._bytes > MAX_BODY_BYTES:
            raise TooLarge(
                f"The body is larger than {MAX_BODY_BYTES} bytes, the most that is read. Send less at a time."
            )
