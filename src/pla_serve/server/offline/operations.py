"""Routes of files and batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from types import MethodType
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.routes import Handler, Operation
from pla_serve.server.errors import ApiError
from pla_serve.server.offline.endpoints import OfflineEndpoints
from pla_serve.server.offline.schema import BatchRequest

FILES, FILE = "/v1/files", "/v1/files/{id}"
BATCHES, BATCH = "/v1/batches", "/v1/batches/{id}"
ERRORS = {
    "4XX": "The request is at fault, or comes at a bad time (429).",
    "507": "The disk has too little space.",
}
Method = Literal["GET", "POST", "DELETE"]
Answers = Callable[[OfflineEndpoints, Request], Awaitable[Response]]
ROUTES: tuple[tuple[Method, str, Answers, str], ...] = (
    ("POST", FILES, OfflineEndpoints.upload, "Keeps a file of requests."),
    ("GET", FILES, OfflineEndpoints.files, "Lists files."),
    ("GET", FILE, OfflineEndpoints.file, "Describes a file."),
    ("GET", FILE + "/content", OfflineEndpoints.content, "Content of a file."),
    ("DELETE", FILE, OfflineEndpoints.delete_file, "Removes a file."),
    ("POST", BATCHES, OfflineEndpoints.create, "Runs the lines of a file."),
    ("GET", BATCHES, OfflineEndpoints.batches, "Lists batches."),
    ("GET", BATCH, OfflineEndpoints.batch, "Describes a batch."),
    ("POST", BATCH + "/cancel", OfflineEndpoints.cancel, "Ends a batch early."),
)
BODIES: dict[Answers, type[BaseModel]] = {OfflineEndpoints.create: BatchRequest}


def offline_operations(endpoints: OfflineEndpoints | None) -> list[Operation]:
    """Return the operations; without endpoints each says which flag is missing."""

    def handler(answers: Answers) -> Handler:
        return _refuse(answers) if endpoints is None else MethodType(answers, endpoints)

    return [
        Operation(method, path, handler(answers), summary, "OpenAI", BODIES.get(answers), ERRORS)
        for method, path, answers, summary in ROUTES
    ]


def _refuse(answers: Answers) -> Handler:
    """Return a handler of the same name that refuses."""

    @wraps(answers)
    async def refuse(request: Request) -> Response:
        raise ApiError(
            404,
            "this server keeps no files and batches; start it with --batch-dir DIR to enable them",
            code="batches_not_enabled",
        )

    return refuse
