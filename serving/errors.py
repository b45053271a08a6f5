"""What can go wrong between a client and the server, each with its status and its words in OpenAI's error body.

HeedError
├── BadRequest            400  the request cannot be understood, or asks for what Heed does not do
│   └── ContextTooLong    400  context_length_exceeded
├── Unauthorized          401  the admin token is missing or wrong
│   └── UnknownKey        401  invalid_api_key   no API key, or none of ours
├── NotFound              404
│   ├── UnknownModel      404  model_not_found
│   ├── UnknownReply      404  unknown_reply     not an id of ours, or another caller's
│   └── UnknownFeedback   404  unknown_feedback
├── MethodNotAllowed      405
├── TooSlow               408  the body did not come
├── Conflict              409  the same id with another body
│   └── NotStored         409  not_stored        a reply that was not kept
├── TooLarge              413
├── Unprocessable         422  malformed feedback or admin command
├── TooManyRequests       429  + Retry-After     the queue is full
│   └── OverQuota         429  + Retry-After     the key's requests of this minute are used up
├── ServerFailed          500  the engine failed
└── Unavailable           503  + Retry-After     loading, draining, or the log takes nothing
"""

from __future__ import annotations

import math
from typing import ClassVar


class HeedError(Exception):
    """An error a client is told of. `str(error)` is the message: what was wrong, what is allowed, what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after = retry_after
        """Seconds after which it is worth trying again; None where trying again changes nothing."""

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error body."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with the status: Retry-After in whole seconds, WWW-Authenticate with a 401."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class BadRequest(HeedError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(HeedError):
    status = 401
    type = "authentication_error"
    code = "invalid_admin_token"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class UnknownKey(Unauthorized):
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(HeedError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class UnknownReply(NotFound):
    code = "unknown_reply"


class UnknownFeedback(NotFound):
    code = "unknown_feedback"


class MethodNotAllowed(HeedError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooSlow(HeedError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(HeedError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class NotStored(Conflict):
    code = "not_stored"


class TooLarge(HeedError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Unprocessable(HeedError):
    status = 422
    type = "invalid_request_error"


class TooManyRequests(HeedError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class OverQuota(TooManyRequests):
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, quota: int, retry_after: float) -> None:
        """`quota`: requests a minute; `retry_after`: seconds until one is granted again."""
        super().__init__(
            f"This API key may send {quota} chats and feedback a minute, and has. Try again in {retry_after:.1f} s.",
            retry_after=retry_after,
        )
        self._limits = {
            "x-ratelimit-limit-requests": str(quota),
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": f"{retry_after:.3f}s",
        }

    def headers(self) -> dict[str, str]:
        return super().headers() | self._limits


class ServerFailed(HeedError):
    status = 500
    type = "server_error"
    code = "engine_failed"


class Unavailable(HeedError):
    status = 503
    type = "server_error"
    code = "unavailable"
