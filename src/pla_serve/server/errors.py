"""Errors as the OpenAI API words them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response


class ApiError(Exception):
    """Error that is sent to the client: as a response, or as an event if the stream has begun."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return what tells clients when and how to come back."""
        headers = {}
        if self.retry_after is not None:
            # Whole seconds, as HTTP has it; at least one, or clients come back at once.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers())


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str | None = None) -> ApiError:
    """Return the error for a field that would change the answer and is not supported."""
    return invalid(message or f"{param} is not supported", param, "unsupported_parameter")


def too_long(tokens: int, limit: int, *, at_least: bool = False, output: int = 0) -> ApiError:
    """Return the error for ``tokens`` of prompt and ``output`` that do not fit into ``limit``."""
    asked = f" and max_tokens asks for {output} more" if output else ""
    return invalid(
        f"This model's context is {limit} tokens, but the prompt has "
        f"{'at least ' if at_least else ''}{tokens} tokens{asked}. Shorten it"
        f"{' or lower max_tokens' if output else ''}.",
        "max_tokens" if output else None,
        "context_length_exceeded",
    )


def over_capacity(reason: str, retry_after: float) -> ApiError:
    return ApiError(
        429,
        reason,
        type="rate_limit_exceeded",
        code="rate_limit_exceeded",
        retry_after=retry_after,
    )


def unavailable(message: str, retry_after: float = 1.0) -> ApiError:
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code="engine_unavailable",
        retry_after=retry_after,
    )


def failed(message: str, status: int = 500) -> ApiError:
    """Return the error of a server that failed; status 502 if an instance behind a router did."""
    return ApiError(status, message, type="server_error", code="internal_error")
