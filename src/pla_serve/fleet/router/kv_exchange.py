"""Asks instances to lend KV, and others to read it: the part that hand-overs and moves share."""

from __future__ import annotations

from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.routed_request import Attempt, RoutedRequest
from pla_serve.wire import engine as wire
from pla_serve.wire.kv_offer import bind


class KvExchange:
    """Sends the messages by which a request's KV gets from one instance to another.

    Args:
        lease_seconds: how long KV is kept for an exchange that makes no progress.
    """

    def __init__(self, attempts: Attempts, lease_seconds: float) -> None:
        self._attempts = attempts
        self.lease_seconds = lease_seconds

    def lend(self, source: FleetInstance, name: str, request: RoutedRequest) -> bool:
        """Ask an instance to lend what it has cached of a request, as a loan of this name.

        Returns whether it could be asked.
        """
        lend = wire.Lend(
            id=name,
            tokens=[*request.original.prompt, *request.tokens],
            lease_seconds=self.lease_seconds,
            cache_scope=request.original.cache_scope,
        )
        return self._attempts.send(source, lend)

    def reserve(self, target: Attempt, request: RoutedRequest, address: bytes) -> bool:
        """Ask the target for memory, and have it read the KV at ``address``.

        Returns whether it could be asked.
        """
        facts = target.instance.facts
        reader = (facts.transfer_agent if facts is not None else None) or ""
        reserve = wire.Reserve(
            request=request.message(target.id),
            source=bind(address, reader),
            lease_seconds=self.lease_seconds,
        )
        return self._attempts.send(target.instance, reserve)


def can_exchange(source: FleetInstance, target: FleetInstance) -> bool:
    """Return whether the target can read the source's KV."""
    return (
        source.facts is not None
        and target.facts is not None
        and source.facts.transfer is not None
        and source.facts.transfer == target.facts.transfer
    )
