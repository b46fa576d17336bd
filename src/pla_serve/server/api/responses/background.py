"""Makes answers in the background: their clients ask for them later, by id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.responses.answer import ResponseFrame
from pla_serve.server.errors import over_capacity

log = logging.getLogger(__name__)

MakesAnswer = Callable[[], Awaitable[None]]
"""Makes an answer and keeps it, also where it is cancelled or fails."""


@dataclass(slots=True)
class _Running:
    tenant: str
    frame: ResponseFrame
    task: asyncio.Task[None]


class BackgroundRuns:
    """Runs answers beside the requests of clients. A drain of the server waits for them.

    Args:
        traffic: counts them.
        most: how many run at once; each tenant may have half of them.

    Belongs to one event loop.
    """

    def __init__(self, traffic: Traffic, most: int) -> None:
        self._traffic = traffic
        self._most = most
        self._running: dict[str, _Running] = {}

    def check_room(self, tenant: str) -> None:
        """Check that one more answer of this tenant may be made in the background.

        Raises:
            ApiError: 429, too many are being made, of this tenant or of all together.
        """
        own = sum(running.tenant == tenant for running in self._running.values())
        if len(self._running) >= self._most or own >= (self._most + 1) // 2:
            raise over_capacity("too many answers are being made in the background", 1.0)

    def start(self, tenant: str, frame: ResponseFrame, work: MakesAnswer) -> None:
        """Run ``work`` until it ends, or until `cancel`."""
        task = asyncio.get_running_loop().create_task(self._run(work))
        self._running[frame.id] = _Running(tenant, frame, task)
        self._traffic.change(+1)
        task.add_done_callback(lambda _: self._end(frame.id))

    def get(self, tenant: str, id: str) -> ResponseFrame | None:
        """Return the tenant's own answer, if it is still being made."""
        running = self._running.get(id)
        return running.frame if running is not None and running.tenant == tenant else None

    async def cancel(self, tenant: str, id: str) -> None:
        """End the making of the tenant's own answer, and wait until it is kept as it is."""
        running = self._running.get(id)
        if running is not None and running.tenant == tenant:
            running.task.cancel()
            await asyncio.wait({running.task})

    def _end(self, id: str) -> None:
        del self._running[id]
        self._traffic.change(-1)

    async def _run(self, work: MakesAnswer) -> None:
        try:
            await work()
        except Exception:
            log.exception("an answer in the background failed")
