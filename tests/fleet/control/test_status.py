"""``/fleet``, the metrics of the controller, and the table."""

from __future__ import annotations

import io
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from starlette.testclient import TestClient

from pla_serve.fleet.control.control import FleetControl
from pla_serve.fleet.router.client import FleetClient
from pla_serve.fleet.router.metrics import FleetMetrics
from pla_serve.fleet.status import ControlMetrics, FleetStatus
from pla_serve.fleet.status_view import show
from pla_serve.policy.pools.balance import BalanceController
from pla_serve.server.api.guard import Keys
from pla_serve.server.api.routes import Api
from tests.fleet.control.fluid_fleet import FACTS, FakeLink


class Fleet:
    """Three links, two of them connected, and a router over them."""

    def __init__(self, *keys: str) -> None:
        self.links = [FakeLink(f"http://i{n}", role) for n, role in enumerate(("short", "long"))]
        self.links.append(FakeLink("http://i2", "long", connected=False, last_report=None))
        self.registry = CollectorRegistry()
        metrics = ControlMetrics(self.registry, "m")
        self.control = FleetControl(
            lambda: self.links, BalanceController(), name="balance", on_decision=metrics.look
        )
        self.client = FleetClient(
            [lambda events, link=link: link for link in self.links],  # type: ignore[misc]
            FleetMetrics("m"),
            control=self.control,
            vocab_size=1000,
        )
        for link in self.links[:2]:
            self.client.fleet.connected(link, FACTS)
            assert link.last_report is not None
            self.client.fleet.report(link, link.last_report)
        self.status = FleetStatus(self.client, self.control, Keys(keys), lambda: 100.0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "m", **labels})


def test_page_tells_of_instances_pools_and_moves() -> None:
    fleet = Fleet()
    for _ in range(4):
        fleet.control.dispatched(True, 100.0, 90.0)
    fleet.links[0].say(queued_short_seconds=400.0)
    fleet.links.append(FakeLink("http://i9", "long"))
    fleet.control.tick(95.0)
    page = fleet.status.describe()
    assert page["pools"] == {"short": 1, "long": 1}
    assert page["status"] == "ready"
    assert page["controller"] == "balance"
    (move,) = page["moves"]
    assert (move["seconds_ago"], move["from"], move["to"]) == (5.0, "long", "short")
    assert page["moves_total"] == 1
    assert page["desired"]["prefill"] >= 13  # 400 s of backlog in 30 s
    assert page["desired"]["demands"]["short"]["queued_seconds"] == 400.0
    urls = {i["url"]: i for i in page["instances"]}
    assert urls["http://i0"]["connected"]
    assert urls["http://i0"]["circuit"] == "closed"
    assert urls["http://i0"]["facts"]["kind"] == "pla"
    assert not urls["http://i2"]["connected"]
    assert urls["http://i2"]["report"] is None


def test_signal_is_a_metric() -> None:
    fleet = Fleet()
    fleet.links[0].say(queued_short_seconds=400.0)
    fleet.control.tick(95.0)
    fleet.control.tick(96.0)
    wanted = fleet.value("pla_serve_fleet:desired_instances", stage="prefill")
    assert wanted is not None
    assert wanted >= 13
    assert fleet.value("pla_serve_fleet:desired_instances", stage="decode") == 0
    assert fleet.value("pla_serve_fleet:role_changes_total") == fleet.control.moves_total
    assert fleet.value("pla_serve_fleet:demand_instances", **{"class": "short"}) == 0


@pytest.mark.parametrize(("key", "code"), [(None, 401), ("wrong", 401), ("secret", 200)])
def test_page_asks_for_a_key_where_there_are_keys(key: str | None, code: int) -> None:
    app = Api(Fleet("secret").status.routes())
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert TestClient(app).get("/fleet", headers=headers).status_code == code


def test_table_shows_everybody() -> None:
    fleet = Fleet()
    fleet.control.tick(95.0)
    out = io.StringIO()
    content: dict[str, Any] = fleet.status.describe()
    show(content, as_json=False, console=Console(file=out, width=160))
    text = out.getvalue()
    for word in ("http://i0", "http://i1", "down: not connected yet", "controller balance"):
        assert word in text
    out = io.StringIO()
    show(content, as_json=True, console=Console(file=out, width=160))
    assert '"controller": "balance"' in out.getvalue()
