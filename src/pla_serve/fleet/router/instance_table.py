"""The instances that a router was given, by link and by name."""

from __future__ import annotations

from collections.abc import Sequence

from pla_serve.fleet.link.protocol import InstanceFacts, Link
from pla_serve.fleet.router.circuit import Circuit, CircuitOptions
from pla_serve.fleet.router.fleet_instance import FleetInstance


class InstanceTable:
    """All instances of a router, by link and by name.

    An instance is attached before its link runs, and is never removed.
    """

    def __init__(self, circuit: CircuitOptions) -> None:
        self._circuit = circuit
        self._by_link: dict[int, FleetInstance] = {}
        self._by_name: dict[str, FleetInstance] = {}

    def __getitem__(self, name: str) -> FleetInstance:
        return self._by_name[name]

    @property
    def all(self) -> Sequence[FleetInstance]:
        """All instances, in the order in which they were attached."""
        return list(self._by_name.values())

    def of(self, link: Link) -> FleetInstance:
        """Return the instance of a link.

        Raises:
            KeyError: the link was not attached.
        """
        return self._by_link[id(link)]

    def attach(self, link: Link) -> FleetInstance:
        """Add the instance at the other end of a link.

        Raises:
            ValueError: there is an instance with the same URL.
        """
        if link.url in self._by_name:
            raise ValueError(f"the instance {link.url} was named twice")
        instance = FleetInstance(link, Circuit(self._circuit), link.url)
        self._by_link[id(link)] = self._by_name[link.url] = instance
        return instance

    def alike(self, instance: FleetInstance) -> list[str]:
        """Return the names of all instances of the same kind of server, with this one."""
        kind = instance.facts.kind if instance.facts else None
        return [one.name for one in self.all if one.facts and one.facts.kind == kind]

    def connected(self, instance: FleetInstance, facts: InstanceFacts) -> bool:
        """Note a new connection; return whether the engine has restarted since the last one."""
        instance.facts, instance.report = facts, None
        instance.connected = True
        instance.epoch += 1
        instance.unfit = self._unfit(instance, facts)
        other = instance.boot != facts.boot
        instance.boot = facts.boot
        return other

    def _unfit(self, instance: FleetInstance, facts: InstanceFacts) -> str:
        """Return why an instance cannot serve beside the others; empty if it can."""
        for other in self._by_name.values():
            known = other.facts.vocab_size if other.facts else 0
            if other is instance or not other.connected or not known or not facts.vocab_size:
                continue
            if facts.vocab_size != known:
                return (
                    f"its vocabulary has {facts.vocab_size} tokens and that of {other.name} "
                    f"{known}; all instances of a fleet must serve the same model"
                )
        return ""
