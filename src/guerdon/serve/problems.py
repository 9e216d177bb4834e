"""Errors that a client sees, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Problem", "bad_field", "payload"]


class Problem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        code: short machine-readable reason.
        message: one line that says what to do.
        type: OpenAI's error class; derived from the status when omitted.
        param: the request field that is wrong.
        retry_after: seconds after which a retry makes sense; becomes the ``Retry-After`` header.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.retry_after = retry_after

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to this error."""
        out = []
        if self.retry_after is not None:
            out.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        if self.status == 401:
            out.append((b"www-authenticate", b"Bearer"))
        return out


_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def payload(problem: Problem) -> dict[str, Any]:
    """The JSON body of ``problem``."""
    error = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return {"error": error}


def bad_field(param: str, message: str, code: str = "invalid_value") -> Problem:
    """A 400 that names the field ``param``."""
    return Problem(400, code, message, param=param)
