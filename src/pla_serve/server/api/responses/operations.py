"""Declarations of the operations of the Responses API."""

from __future__ import annotations

from pla_serve.server.api.responses.endpoints import ResponsesEndpoints
from pla_serve.server.api.responses.schema import ResponsesRequest
from pla_serve.server.api.routes import Operation

RESPONSES = "/v1/responses"
ONE = RESPONSES + "/{id}"
TAG = "Responses"
REFUSED = {"4XX": "The request is at fault, or comes at a bad time (429)."}
UNKNOWN = {"404": "This API key has no such response."}


def response_operations(endpoints: ResponsesEndpoints) -> list[Operation]:
    """Return the operations, each with the method that answers it."""
    return [
        Operation(
            "POST",
            RESPONSES,
            endpoints.create_response,
            "Answers a conversation of items, whole, as server-sent events or in the background.",
            TAG,
            ResponsesRequest,
            {**REFUSED, "503": "The engine is not up; see Retry-After."},
        ),
        Operation("GET", ONE, endpoints.response, "A stored answer.", TAG, answers=UNKNOWN),
        Operation("DELETE", ONE, endpoints.delete_response, "Forgets it.", TAG, answers=UNKNOWN),
        Operation(
            "POST",
            ONE + "/cancel",
            endpoints.cancel_response,
            "Ends an answer in the background.",
            TAG,
            answers={**REFUSED, **UNKNOWN},
        ),
        Operation(
            "GET",
            ONE + "/input_items",
            endpoints.input_items,
            "What the answer was made from, item by item.",
            TAG,
            answers={**REFUSED, **UNKNOWN},
        ),
    ]
