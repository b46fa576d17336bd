"""The operations of files and batches."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.generations import client_of
from pla_serve.server.api.guard import tenant
from pla_serve.server.errors import ApiError, invalid, json_response
from pla_serve.server.offline.database import Database, no_such_file
from pla_serve.server.offline.download import FileContent
from pla_serve.server.offline.owners import Owners
from pla_serve.server.offline.records import (
    LIVE,
    OfflineBatch,
    StoredFile,
    new_batch_id,
)
from pla_serve.server.offline.runner import BatchRunner
from pla_serve.server.offline.schema import BatchRequest, window_seconds
from pla_serve.server.offline.store import OfflineStore
from pla_serve.server.offline.upload import Uploads

MOST_LISTED_FILES = 10_000
MOST_LISTED_BATCHES = 100
USUAL_BATCHES = 20


class OfflineEndpoints:
    """Methods that answer the routes, one for each. They raise `ApiError` for failures.

    Args:
        stall_seconds: a download whose client reads nothing for so long is ended.
    """

    def __init__(
        self,
        store: OfflineStore,
        owners: Owners,
        uploads: Uploads,
        bodies: BodyReader,
        runner: BatchRunner,
        stall_seconds: float,
    ) -> None:
        self._store = store
        self._owners = owners
        self._uploads = uploads
        self._bodies = bodies
        self._runner = runner
        self._stall_seconds = stall_seconds

    async def upload(self, request: Request) -> Response:
        file = await self._uploads.take(request, self._owner(request))
        return json_response(file.card())

    async def files(self, request: Request) -> Response:
        owner, query = self._owner(request), request.query_params
        most = _limit(query, MOST_LISTED_FILES, MOST_LISTED_FILES)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise invalid("order must be asc or desc", "order")
        purpose, after = query.get("purpose"), query.get("after")

        def listed(database: Database) -> bytes:
            found = database.files(
                owner, purpose=purpose, after=after, most=most + 1, newest_first=order == "desc"
            )
            return _page(found, most)

        return _json(await self._store.run(listed))

    async def file(self, request: Request) -> Response:
        return json_response((await self._file(request)).card())

    async def content(self, request: Request) -> Response:
        file = await self._file(request)
        path = self._store.path(file.id)
        if not await self._store.write(path.is_file):
            raise no_such_file(file.id)
        return FileContent(self._store, path, file.size, self._stall_seconds)

    async def delete_file(self, request: Request) -> Response:
        owner, id = self._owner(request), request.path_params["id"]
        if not await self._store.run(lambda database: database.delete_file(owner, id)):
            raise no_such_file(id)
        await self._store.write(lambda: self._store.remove(id))
        return json_response({"id": id, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Response:
        store, owner = self._store, self._owner(request)
        with self._bodies.upload(client_of(request)) as upload:
            body = await upload.read_json(request, BatchRequest)
        store.check_space()
        now = store.now()
        batch = OfflineBatch(
            place=0,
            id=new_batch_id(),
            owner=owner,
            status="validating",
            endpoint=body.endpoint,
            input_file=body.input_file_id,
            window=body.completion_window,
            metadata=body.metadata,
            created=now,
            expires=now + window_seconds(body.completion_window),
        )
        await store.run(lambda database: database.add_batch(batch))
        self._runner.wake()
        return json_response(batch.card())

    async def batches(self, request: Request) -> Response:
        owner, query = self._owner(request), request.query_params
        most, after = _limit(query, USUAL_BATCHES, MOST_LISTED_BATCHES), query.get("after")

        def listed(database: Database) -> bytes:
            return _page(database.batches(owner, after=after, most=most + 1), most)

        return _json(await self._store.run(listed))

    async def batch(self, request: Request) -> Response:
        return json_response((await self._batch(request)).card())

    async def cancel(self, request: Request) -> Response:
        batch = await self._batch(request)
        now = self._store.now()
        cancelled = await self._store.run(
            lambda database: database.change_status(
                batch, "cancelling", now, only_from=("validating", "in_progress")
            )
        )
        self._runner.wake()
        batch = await self._batch(request)
        if not cancelled and batch.status not in ("cancelling", "cancelled"):
            ended = "is over" if batch.status not in LIVE else "is nearly over"
            raise ApiError(
                409, f"the batch {ended} ({batch.status}) and cannot be cancelled", param="batch_id"
            )
        return json_response(batch.card())

    def _owner(self, request: Request) -> str:
        return self._owners.of(tenant(request.scope))

    async def _file(self, request: Request) -> StoredFile:
        owner, id = self._owner(request), request.path_params["id"]
        file = await self._store.run(lambda database: database.file(owner, id))
        if file is None:
            raise no_such_file(id)
        return file

    async def _batch(self, request: Request) -> OfflineBatch:
        owner, id = self._owner(request), request.path_params["id"]
        batch = await self._store.run(lambda database: database.batch(owner, id))
        if batch is None:
            raise ApiError(404, f"No batch found with id '{id[:100]}'.", param="batch_id")
        return batch


def _limit(query: Mapping[str, str], usual: int, most: int) -> int:
    """Raises:
    ApiError: 400, the limit of a list is no number from 1 to ``most``.
    """
    text = query.get("limit", str(usual))
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        raise invalid(f"limit must be a whole number from 1 to {most}", "limit")
    return int(text)


def _page(found: list[StoredFile] | list[OfflineBatch], most: int) -> bytes:
    """Return a page of a list as JSON; there is one more than it has, if there are more."""
    cards = [each.card() for each in found[:most]]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": cards,
            "first_id": cards[0]["id"] if cards else None,
            "last_id": cards[-1]["id"] if cards else None,
            "has_more": len(found) > most,
        }
    )


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
