"""What happens to every request on its way: a bounded body, a count, and a goodbye while the server drains."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import HeedError, TooLarge
from serving.routes.feedback import GIVE
from serving.routes.wiring import Wiring
from serving.schemas import MAX_BODY_BYTES

SHORT_BODY_BYTES = 1 << 16
"""What comes in a moment, and costs less to pass over than a new connection would."""

_log = logging.getLogger(__name__)


class Door:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, parts: Wiring) -> None:
        self._app = app
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        bounded = _Bounded(scope, receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # a stranger's long body is not even waited for
                if self._parts.draining or (status == 401 and bounded.long):
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, bounded, answer)
        except Exception:  # a defect: nobody above would say so in our shape
            if status:
                raise  # an answer that was begun is cut off, so that nobody takes it for whole
            _log.exception("%s %s failed", scope["method"], scope["path"])
            failed = HeedError("The server failed on this request; its log says how. Trying again may help.")
            await JSONResponse(failed.body(), failed.status)(scope, receive, answer)
        finally:
            # the one route that is not FastAPI's own is not named in the scope
            plain = GIVE if scope["path"] == GIVE else ""
            route = plain or getattr(scope.get("route"), "path", "") or scope.get("root_path") or "other"
            self._parts.metrics.answered(route, status, time.monotonic() - began)


class _Bounded:
    """Reads a request's body up to the limit. Raises TooLarge beyond, or at once where the length is announced."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
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
