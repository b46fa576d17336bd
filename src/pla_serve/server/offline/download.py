"""Sends the content of a file."""

from __future__ import annotations

import logging
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pla_serve.server.api.event_stream import StalledError, StallWatch
from pla_serve.server.offline.store import OfflineStore

log = logging.getLogger(__name__)

PIECE_BYTES = 256 * 2**10


class FileContent(Response):
    """The whole content of a file, in pieces. A client that stops reading is given up.

    Args:
        path: of a file that does not change.
        size: its bytes.
    """

    media_type = "application/octet-stream"

    def __init__(self, store: OfflineStore, path: Path, size: int, stall_seconds: float) -> None:
        super().__init__(headers={"x-content-type-options": "nosniff"})
        self.headers["content-length"] = str(size)
        self._store = store
        self._path = path
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        file = await self._store.write(lambda: self._path.open("rb"))
        watch = StallWatch(self._stall_seconds)
        try:
            with watch:
                await watch.send(send, start)
                while piece := await self._store.write(lambda: file.read(PIECE_BYTES)):
                    more = {"type": "http.response.body", "body": piece, "more_body": True}
                    await watch.send(send, more)
                await watch.send(send, {"type": "http.response.body", "body": b""})
        except StalledError:
            log.warning("a client did not read for %.0f s; its download ends", self._stall_seconds)
        finally:
            self._store.writers.submit(file.close)
