"""Makes answers in the background: their clients ask for them later, by id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pla_serve.server.api.formats import Json
from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.responses.answer import ResponseFrame
from pla_serve.server.errors import over_capacity

log = logging.getLogger(__name__)

MakesAnswer = Callable[[], Awaitable[Json]]
"""Returns an answer that is over, also where the making of it is cancelled or fails."""
KeepsAnswer = Callable[[Json], Awaitable[object]]
"""Stores an answer that is over."""


@dataclass(slots=True)
class _Running:
    tenant: str
    frame: ResponseFrame
    task: asyncio.Task[None] | None = None
    can_be_cancelled: bool = True
    """Only once, and not while the answer is being stored: it would be lost."""


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

    def start(
        self, tenant: str, frame: ResponseFrame, make: MakesAnswer, keep: KeepsAnswer
    ) -> None:
        """Run ``make`` until it ends, or until `cancel`, and give its answer to ``keep``.

        Raises:
            ApiError: 429, too many run already.
        """
        self.check_room(tenant)
        running = self._running[frame.id] = _Running(tenant, frame)
        self._traffic.change(+1)
        running.task = asyncio.get_running_loop().create_task(self._run(running, make, keep))
        running.task.add_done_callback(lambda _: self._end(frame.id))

    def get(self, tenant: str, id: str) -> ResponseFrame | None:
        """Return the tenant's own answer, if it is still being made."""
        running = self._running.get(id)
        return running.frame if running is not None and running.tenant == tenant else None

    async def cancel(self, tenant: str, id: str) -> None:
        """End the making of the tenant's own answer, and wait until it is kept as it is."""
        running = self._running.get(id)
        if running is None or running.tenant != tenant or running.task is None:
            return
        if running.can_be_cancelled:
            running.can_be_cancelled = False
            running.task.cancel()
        await asyncio.wait({running.task})

    def _end(self, id: str) -> None:
        del self._running[id]
        self._traffic.change(-1)

    async def _run(self, running: _Running, make: MakesAnswer, keep: KeepsAnswer) -> None:
        try:
            answer = await make()
            running.can_be_cancelled = False
            await keep(answer)
        except Exception:
            log.exception("an answer in the background failed")
