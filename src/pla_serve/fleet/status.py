"""``/fleet``: state of the instances as the router knows it, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.requests import Request
from starlette.responses import Response

from pla_serve.fleet.control.control import FleetControl
from pla_serve.fleet.router.client import FleetClient
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.server.api.guard import Keys
from pla_serve.server.api.routes import Operation
from pla_serve.server.errors import json_response


class FleetStatus:
    """Describes a fleet for people and autoscalers.

    Args:
        clock: monotonic seconds, the same as the fleet's.
    """

    def __init__(
        self, client: FleetClient, control: FleetControl, keys: Keys, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._control = control
        self._keys = keys
        self._clock = clock

    def routes(self) -> list[Operation]:
        """The page, for clients that send one of the keys."""

        async def fleet(request: Request) -> Response:
            return json_response(self.describe())

        summary = "Instances, pools, recent moves, and how many instances there should be."
        return [Operation("GET", "/fleet", fleet, summary, keys=self._keys)]

    def describe(self, most_instances: int | None = None) -> dict[str, Any]:
        """Return the state, JSON-ready. Times are seconds; ``seconds_ago`` counts back from now.

        Args:
            most_instances: how many instances are described; None for all. Pools count all.
        """
        fleet, now = self._client.fleet, self._clock()
        instances = self._client.instances
        pools: dict[str, int] = {}
        for instance in instances:
            if instance.connected:
                pools[instance.role] = pools.get(instance.role, 0) + 1
        return {
            "status": self._client.status,
            "requests_in_flight": fleet.in_flight,
            "requests_parked": fleet.parked,
            "held_seconds": round(fleet.held_seconds, 4),
            "pools": pools,
            "desired": self._desired(),
            "controller": self._control.name,
            "moves_total": self._control.moves_total,
            "moves": [
                {
                    "seconds_ago": round(now - moved.at, 3),
                    "instance": moved.move.instance_id,
                    "from": moved.move.source.value,
                    "to": moved.move.target.value,
                }
                for moved in self._control.moves
            ],
            "instances": [self._instance(instance, now) for instance in instances[:most_instances]],
        }

    def _instance(self, instance: FleetInstance, now: float) -> dict[str, Any]:
        requests, seconds = self._client.fleet.dispatcher.outstanding(instance.name)
        return {
            "url": instance.name,
            "role": instance.role if instance.report else None,
            "connected": instance.connected,
            "open": instance.open,
            "unfit": instance.unfit or None,
            "last_loss": instance.last_loss or None,
            "circuit": instance.circuit.state(now).value,
            "requests_of_this_router": requests,
            "charged_seconds": round(seconds, 4),
            "report": msgspec.to_builtins(instance.report) if instance.report else None,
            "facts": _facts(instance),
        }

    def _desired(self) -> dict[str, Any] | None:
        desired = self._control.desired
        if desired is None:
            return None
        return {
            "prefill": desired.prefill,
            "decode": desired.decode,
            "demands": {
                pool.value: {"queued_seconds": demand.queued, "seconds_a_second": demand.rate}
                for pool, demand in desired.demands.items()
            },
        }


def _facts(instance: FleetInstance) -> dict[str, Any] | None:
    if instance.facts is None:
        return None
    facts: dict[str, Any] = msgspec.to_builtins(instance.facts)
    facts["transfer"] = facts.get("transfer") is not None  # an address is of no use here
    return facts


class ControlMetrics:
    """Metrics of the autoscaling signal and of the controller's moves."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._desired = Gauge(
            "pla_serve_fleet:desired_instances",
            "How many instances there should be, by stage: prefill (short, long and mixed ones) "
            "or decode. Counts queued work.",
            ["model_name", "stage"],
            registry=registry,
        )
        self._demand = Gauge(
            "pla_serve_fleet:demand_instances",
            "Prefill that arrives, in instances, by class.",
            ["model_name", "class"],
            registry=registry,
        )
        self._moves = Counter(
            "pla_serve_fleet:role_changes",
            "Instances that the controller moved.",
            ["model_name"],
            registry=registry,
        ).labels(model_name)
        self._model = model_name
        self._seen = 0

    def look(self, control: FleetControl) -> None:
        """Update the metrics; called after each decision of the controller."""
        self._moves.inc(control.moves_total - self._seen)
        self._seen = control.moves_total
        desired = control.desired
        if desired is None:
            return
        self._desired.labels(self._model, "prefill").set(desired.prefill)
        self._desired.labels(self._model, "decode").set(desired.decode)
        for pool, demand in desired.demands.items():
            self._demand.labels(self._model, pool.value).set(demand.rate)
