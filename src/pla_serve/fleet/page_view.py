"""A view of a fleet for the page of its router: the state that ``/fleet`` tells, cut short."""

from __future__ import annotations

from typing import Any

from pla_serve.fleet.router.client import FleetClient
from pla_serve.fleet.status import FleetStatus

MOST_INSTANCES = 256
"""Instances in one sample."""


class FleetPageView:
    """The state that ``/fleet`` tells, without what does not change."""

    def __init__(self, client: FleetClient, status: FleetStatus) -> None:
        self._client = client
        self._status = status

    @property
    def boundary_tokens(self) -> int:
        """L_m of the cost model that the router goes by."""
        return self._client.fleet.dispatcher.cost.boundary_tokens

    def describe(self) -> dict[str, Any]:
        """Return the state of the fleet, JSON-ready."""
        state = self._status.describe(MOST_INSTANCES)
        return {
            "kind": "router",
            "parked": state["requests_parked"],
            "pools": state["pools"],
            "desired": state["desired"],
            "controller": state["controller"],
            "moves": state["moves"],
            "moves_total": state["moves_total"],
            "instances": [_instance(each) for each in state["instances"]],
            "instances_total": len(self._client.instances),
        }


def _instance(state: dict[str, Any]) -> dict[str, Any]:
    report = state["report"]
    load = dict(report["load"]) if report else None
    if load is not None:
        del load["cost"]
    names = ("url", "role", "connected", "open", "unfit", "last_loss", "circuit")
    return {
        **{name: state[name] for name in names},
        "requests": state["requests_of_this_router"],
        "draining": bool(report and report["draining"]),
        "load": load,
    }
