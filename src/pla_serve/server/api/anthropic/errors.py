"""Errors as Anthropic words them, with the statuses that its clients know."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from pla_serve.logs import request_id
from pla_serve.server.errors import ApiError, json_response

PREFIX = "/v1/messages"
"""Begin of the paths that answer so."""
THREAD = "thread"
"""Field with which clients ask for conversations that the server keeps."""
OVERLOADED = 529
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Types by status; other statuses are faults of the request below 500, and of the server above."""


def error_body(error: ApiError) -> dict[str, Any]:
    """Return ``{"type": "error", "error": {"type", "message"}, "request_id"}``."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.param == THREAD:
        told["details"] = {"error_code": "thread_unsupported_request"}
    return {
        "type": "error",
        "error": told,
        "request_id": request_id.get() or None,
    }


def error_response(error: ApiError) -> Response:
    """Return the answer to a request that failed; 503 is Anthropic's 529."""
    status = OVERLOADED if error.status == 503 else error.status
    return json_response(error_body(error), status, error.headers())


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def respond(error: ApiError, path: str) -> Response:
    """Return the answer to a failed request on ``path``, in the words of the API it belongs to."""
    return error_response(error) if is_anthropic(path) else error.response()
