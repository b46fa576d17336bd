"""Offline batches of one server: their store, their endpoints, and what runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.types import ASGIApp

from pla_serve.server.api.body import BodyReader
from pla_serve.server.api.routes import Operation
from pla_serve.server.engine.backend import Backend
from pla_serve.server.offline.caller import Answered, LineCaller
from pla_serve.server.offline.endpoints import OfflineEndpoints
from pla_serve.server.offline.lines import LineRequest
from pla_serve.server.offline.metrics import OfflineMetrics
from pla_serve.server.offline.operations import offline_operations
from pla_serve.server.offline.owners import Owners
from pla_serve.server.offline.runner import BatchRunner
from pla_serve.server.offline.store import OfflineStore
from pla_serve.server.offline.upload import Uploads
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.settings import ServerSettings

MOST_BATCH_BODY = 64 * 2**10
"""Largest body of ``POST /v1/batches``."""


class OfflineService:
    """Made before the application that its lines go through, for which it has `operations`.

    Raises:
        FolderError: the folder cannot be used.
    """

    def __init__(self, settings: ServerSettings, backend: Backend, metrics: Metrics) -> None:
        self._owners = Owners(settings.api_keys)
        self._backend = backend
        self._store = OfflineStore(settings.offline)
        self._caller: LineCaller | None = None
        self._runner = BatchRunner(
            self._store,
            self._call,
            self,
            OfflineMetrics(metrics.registry, settings.model_names[0]),
            most_body_bytes=settings.max_body_bytes,
        )
        self._running: asyncio.Task[None] | None = None
        self._stopped = False
        self.operations: list[Operation] = offline_operations(
            OfflineEndpoints(
                self._store,
                self._owners,
                Uploads(self._store, settings.limits.body_seconds),
                BodyReader(MOST_BATCH_BODY, settings.limits),
                self._runner,
                settings.stall_seconds,
            )
        )

    @asynccontextmanager
    async def serving(self, app: ASGIApp) -> AsyncIterator[None]:
        """Run batches, their lines through ``app``, until `stop` or the end of the context."""
        self._caller = LineCaller(app, self._owners)
        self._running = asyncio.create_task(self._runner.run())
        try:
            yield
        finally:
            self.stop()
            with suppress(asyncio.CancelledError):
                await self._running
            await asyncio.to_thread(self._store.close)

    def stop(self) -> None:
        """End the lines that run; the next server with this folder runs them again."""
        self._stopped = True
        if self._running is not None:
            self._running.cancel()

    def is_open(self) -> bool:
        """Whether a line may start now."""
        return self._backend.is_ready and not self._stopped

    def may_run(self, owner: str) -> bool:
        """Whether the key of this owner is one of this server."""
        return owner in self._owners

    async def _call(self, owner: str, request: LineRequest, id: str, due: bool) -> Answered:
        assert self._caller is not None
        return await self._caller.call(owner, request, id, due=due)
