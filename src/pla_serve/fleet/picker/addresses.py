"""Where instances are, as IP addresses, which is how Envoy wants to be told."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from pla_serve.fleet.router.fleet_instance import FleetInstance

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 2.0
PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str], Awaitable[str]]
"""Returns an IP address of a host name, or raises OSError."""


class InstanceAddresses:
    """Addresses of instances, ``10.0.0.7:8000`` or ``[fd00::7]:8000``.

    A host name is looked up once for each connection of its instance: an instance that has come
    back elsewhere, as a new pod does, has a new connection. However many ask meanwhile, each
    instance is looked up once at one time.
    """

    def __init__(self, resolve: Resolve | None = None) -> None:
        self._resolve = resolve or _look_up
        self._known: dict[str, tuple[int, str]] = {}
        """Connection and address of each instance, by name."""
        self._asked: dict[tuple[str, int], asyncio.Task[str | None]] = {}
        """Lookups under way, by the instance's name and connection."""

    async def of(self, instance: FleetInstance) -> str | None:
        """Return the address of an instance; None if its name cannot be looked up now."""
        known = self._known.get(instance.name)
        if known is not None and known[0] == instance.epoch:
            return known[1]
        key = instance.name, instance.epoch
        if key not in self._asked:
            self._asked[key] = asyncio.create_task(self._find(*key))
            self._asked[key].add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(self._asked[key])  # for the others, if this request ends

    async def _find(self, name: str, epoch: int) -> str | None:
        url = urlsplit(name)
        host, port = url.hostname or "", url.port or PORTS.get(url.scheme, 80)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = ipaddress.ip_address(await self._resolve(host))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            log.warning("cannot look up %s: %s", host, error or type(error).__name__)
            return None
        text = f"[{found}]:{port}" if found.version == 6 else f"{found}:{port}"
        self._known[name] = (epoch, text)
        return text


async def _look_up(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
        return str(found[0][4][0])
