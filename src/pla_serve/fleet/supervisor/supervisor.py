"""Supervises the processes of a fleet on this machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from pla_serve.fleet.supervisor.member import FleetMember

log = logging.getLogger(__name__)


class Supervisor:
    """Runs instances and a router before them, and keeps all of them running.

    Args:
        drain_seconds: how long running requests may go on after `stop`.
    """

    def __init__(
        self, instances: Sequence[FleetMember], router: FleetMember, *, drain_seconds: float
    ) -> None:
        self._instances = instances
        self._router = router
        self._drain_seconds = drain_seconds
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._renewal: asyncio.Task[None] | None = None

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Run the fleet until `stop` was called and all processes have ended.

        Args:
            on_ready: called once, when all processes are ready.

        Raises:
            FleetStartError: a process could not be started; all others were ended.
        """
        members = [*self._instances, self._router]
        running = [asyncio.create_task(member.run()) for member in members]
        stopping = asyncio.create_task(self._stopping.wait())
        announce = asyncio.create_task(self._announce(on_ready))
        try:
            await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            announce.cancel()
            stopping.cancel()
            if self._renewal is not None:
                self._renewal.cancel()
            await self._end()
            results = await asyncio.gather(*running, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def stop(self) -> None:
        """Drain all processes and end `run`; a second call ends them at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    def renew(self) -> None:
        """Restart instances one after another, then the router, each after its drain."""
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew())
        else:
            log.warning("a rolling restart is under way already")

    async def _renew(self) -> None:
        for member in (*self._instances, self._router):
            log.info("renewing %s", member.recipe.name)
            await member.renew(self._drain_seconds)
        log.info("all processes were renewed")

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        await asyncio.gather(*(member.ready.wait() for member in self._instances))
        await self._router.ready.wait()
        on_ready()

    async def _end(self) -> None:
        """End the router first, because running requests need their instances."""
        drain = asyncio.create_task(self._drain())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            log.warning("ending all processes at once")
            for member in (self._router, *self._instances):
                member.kill()
            drain.cancel()
        with suppress(asyncio.CancelledError):
            await drain

    async def _drain(self) -> None:
        await self._router.stop(self._drain_seconds)
        await asyncio.gather(*(member.stop(self._drain_seconds) for member in self._instances))
