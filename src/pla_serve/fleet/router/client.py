"""The backend of the API server that is a fleet: links, waiting for instances, sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pla_serve.fleet.link.protocol import InstanceFacts, Link, LinkEvents, LinkRefused
from pla_serve.fleet.router.contract import FleetOptions, RoutingObserver
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.tenant_routes import TenantRoutes
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.server.engine.backend import EngineStartError, EngineUnavailableError
from pla_serve.server.engine.session import EngineDiedError, EngineSession
from pla_serve.wire.engine import EngineReady

if TYPE_CHECKING:
    from pla_serve.fleet.control.control import FleetControl

log = logging.getLogger(__name__)

MakeLink = Callable[[LinkEvents], Link]

REFUSED_SECONDS = 30.0
"""Seconds after which a link that was refused is tried again. The key or the version may have been
corrected by then."""


class FleetClient:
    """A `Backend`. All methods belong to one event loop.

    Args:
        links: make the link to each instance, given whom to tell.
        observer: called with what happens, as the metrics.
        control: moves instances between roles while `run` runs; ``observer`` must tell it.
        vocab_size: token ids of the model as the router knows it, for instances that do not say
            how many they have, as plain vLLM and SGLang servers.

    Raises:
        ValueError: no links, or two to one instance.
    """

    def __init__(
        self,
        links: Sequence[MakeLink],
        observer: RoutingObserver,
        *,
        options: FleetOptions | None = None,
        routing: RoutingPolicy | None = None,
        control: FleetControl | None = None,
        vocab_size: int,
        max_waiting: int = 4096,
        refused_seconds: float = REFUSED_SECONDS,
    ) -> None:
        if not links:
            raise ValueError("a router needs an instance: --instance URL")
        self.fleet = Fleet(
            time.monotonic,
            lambda seconds, call: asyncio.get_running_loop().call_later(seconds, call),
            observer,
            options=options,
            routing=routing,
            on_change=self._changed,
            timer=time.perf_counter,
        )
        self._links = [make(self.fleet) for make in links]
        for link in self._links:
            self.fleet.attach(link)
        self.control = control
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._refused_seconds = refused_seconds
        self._refusals: dict[str, str] = {}
        """Reasons of instances that have never let this router in, by URL."""
        self._waiting = 0
        self._ready = asyncio.Event()
        self._stopped = asyncio.Event()
        self._was_ready = False

    @property
    def instances(self) -> Sequence[FleetInstance]:
        """All instances, for `/fleet`, the controller and metrics; only the fleet changes them."""
        return self.fleet.instances

    @property
    def info(self) -> EngineReady | None:
        """Limits that hold on every instance that was ever connected; None before the first."""
        facts = [i.facts for i in self.fleet.instances if i.facts and not i.unfit]
        return fleet_facts(facts, self._vocab_size)

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def status(self) -> str:
        if self._stopped.is_set():
            return "stopped"
        if self.is_ready:
            return "ready"
        return "restarting" if self._was_ready else "starting"

    async def run(self) -> None:
        """Keep the links up until `stop`.

        Raises:
            EngineStartError: every instance has refused this router.
        """
        stopped = asyncio.create_task(self._stopped.wait())
        control = asyncio.create_task(self._decide())
        links: set[asyncio.Task[None]] = {
            asyncio.create_task(self._keep(link)) for link in self._links
        }
        try:
            while not stopped.done():
                done, _ = await asyncio.wait({stopped, *links}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & links:
                    links.discard(task)
                    task.result()
                if not links and not stopped.done():
                    raise EngineStartError("all links have ended")
        finally:
            self._stopped.set()
            for task in (stopped, control, *links):
                task.cancel()
            await asyncio.gather(stopped, control, *links, return_exceptions=True)

    async def _keep(self, link: Link) -> None:
        """Run one link until it is closed, and try again if the instance refuses it.

        Raises:
            EngineStartError: all instances have refused this router, and none was ever ready.
        """
        while True:
            try:
                await link.run()
                return
            except LinkRefused as error:
                log.error("%s; asking again in %.0f s", error, self._refused_seconds)
                self._refusals[link.url] = str(error)
                if len(self._refusals) == len(self._links) and not self._was_ready:
                    raise EngineStartError("; ".join(self._refusals.values())) from None
            except Exception:
                # A link that fails on what its instance says must not end the others' service.
                log.exception("the link to %s failed; a new one begins", link.url)
            await asyncio.sleep(self._refused_seconds)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End all requests and links; the instances go on."""
        self.fleet.fail_all("the router is shutting down")
        self._stopped.set()
        self._ready.clear()
        for link in self._links:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await link.close()

    async def ready(self) -> EngineReady:
        """Wait, without a limit, until some instance takes requests."""
        await self._ready.wait()
        info = self.info
        assert info is not None
        return info

    async def wait_ready(self, seconds: float) -> EngineReady:
        """Wait until some instance takes requests, and return the limits of the fleet.

        Raises:
            EngineUnavailableError: not within ``seconds``, or too many requests wait already.
        """
        if not self._ready.is_set():
            if self._stopped.is_set() or self._waiting >= self._max_waiting:
                raise EngineUnavailableError("no instance is ready", 5.0)
            self._waiting += 1
            try:
                async with asyncio.timeout(seconds):
                    await self._ready.wait()
            except TimeoutError:
                raise EngineUnavailableError("no instance is ready", 5.0) from None
            finally:
                self._waiting -= 1
        info = self.info
        assert info is not None
        return info

    def session(self, max_unread_tokens: int, tenant: str = "") -> EngineSession:
        return EngineSession(
            TenantRoutes(self.fleet, self._check_open, tenant), max_unread_tokens, tenant
        )

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise EngineDiedError("the router is shutting down")

    async def _decide(self) -> None:
        """Have the controller decide once in each control period."""
        control = self.control
        while control is not None:
            await asyncio.sleep(control.options.period_seconds)
            try:
                control.tick(time.monotonic(), self.fleet.held_seconds)
            except Exception:
                log.exception("the controller failed; its next decision is due as ever")

    def _changed(self) -> None:
        if self.fleet.serving and not self._stopped.is_set():
            self._ready.set()
            self._was_ready = True
        else:
            self._ready.clear()


def fleet_facts(facts: Sequence[InstanceFacts], vocab_size: int) -> EngineReady | None:
    """Return what may be asked of any of the instances, or None if there are none.

    ``vocab_size`` holds where no instance says how many token ids it has.
    """
    if not facts:
        return None
    first = facts[0]
    return EngineReady(
        max_model_len=min(each.max_model_len for each in facts),
        kv_tokens=sum(each.kv_tokens for each in facts),
        kv_bytes_per_token=first.kv_bytes_per_token,
        layers=first.layers,
        vocab_size=max(each.vocab_size for each in facts) or vocab_size,
        device=first.device or "unknown",
        dtype=first.dtype or "unknown",
        policy=first.policy or "unknown",
    )
