"""Random schedules of everything that can happen to a fleet, against an oracle.

Whatever happens in whatever order: each request ends exactly once; if it was not refused, aborted
or given up by its limits, with exactly the tokens of one instance that never fails; and afterwards
nothing is left of it anywhere.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.fleet.router.dispatch import BLAME_SECONDS
from pla_serve.wire.engine import AddRequest, Reserve
from tests.fleet.router.fake_fleet import Bench, FakeLink, oracle

# "fetch" is no role: the instances can exchange KV.
ROLES = [
    ["mixed"] * 3,
    ["short", "long", "long"],
    ["short", "long", "decode", "decode"],
    ["mixed", "decode"],
    ["mixed", "mixed", "mixed", "fetch"],
]
PREFIXES = [[], list(range(48)), list(range(100, 140)), list(range(200, 1400))]

Event = tuple[str, int, int]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit"] * 4
            + ["step"] * 6
            + ["flush"] * 6
            + ["trickle"] * 4
            + ["cut", "cut", "restart", "connect", "connect", "connect"]
            + ["abort", "refuse", "relent", "error", "expire", "drain", "undrain", "wait", "role"]
            + ["notice", "notice", "wait"]
        ),
        st.integers(0, 3),
        st.integers(0, 7),
    ),
    max_size=120,
)


class Schedule:
    """A bench that things happen to, and checks that hold at every moment."""

    def __init__(self, roles: list[str]) -> None:
        # Limits out of reach: whatever can be served must be.
        fetch = "fetch" in roles
        self.bench = Bench(
            roles=[role for role in roles if role != "fetch"],
            transfer=fetch,
            most_failures=10_000,
            most_lost_engines=10_000,
            patience_seconds=1e9,
        )
        self.clients: list[Any] = []
        self.aborted: set[str] = set()
        self._watch_sends()

    def apply(self, event: Event) -> None:
        kind, which, amount = event
        links = self.bench.links
        link = links[which % len(links)]
        if kind == "submit":
            prompt = [*PREFIXES[(amount + which) % 4], which, *range(amount * 9)]
            temperature = float(amount % 2)
            self.clients.append(self.bench.submit(prompt, 1 + amount, temperature=temperature))
        elif kind == "step" and link.connected:
            link.step(1 + amount % 3)
        elif kind == "flush" and link.connected:
            link.flush()
        elif kind == "trickle" and link.connected:
            link.flush(1)
        elif kind in ("cut", "restart") and link.connected:
            link.cut(restart=kind == "restart")
        elif kind == "connect" and not link.connected:
            link.connect()
        elif kind == "abort" and self.clients:
            client = self.clients[amount % len(self.clients)]
            if not client.ended:
                self.aborted.add(client.id)
            self.bench.fleet.close(client.id)
        elif kind == "refuse":
            link.refuse = True
        elif kind == "relent":
            link.refuse = False
        elif kind in ("error", "expire") and link.connected and link.jobs:
            id = sorted(link.jobs)[amount % len(link.jobs)]
            (link.error if kind == "error" else link.expire)(id)
        elif kind in ("drain", "undrain") and link.connected:
            link.report(draining=kind == "drain")
        elif kind == "notice" and link.connected:
            link.report(ready=False, ends_in=amount / 2)
        elif kind == "wait":
            self.bench.clock.advance(amount / 3)
        elif kind == "role" and link.connected and amount < 4:
            link.role = ["mixed", "short", "long", "decode"][amount]
            link.report()

    def finish(self) -> None:
        """The weather clears, and all is served."""
        for link in self.bench.links:
            link.refuse = False
            if not link.connected:
                link.connect()
            link.report()
        for _ in range(60):
            self.bench.run(3)
            self.bench.clock.advance(1.0)

    def check(self) -> None:
        for client in self.clients:
            if client.id in self.aborted:
                assert not client.ended
                continue
            assert len(client.ends) == 1, client.ends
            if client.ends == ["rejected"]:
                assert client.accepted == 0
                assert client.tokens == []
                assert client.rejected.retry_after is not None
                continue
            assert client.ends == ["length"]
            assert client.accepted <= 1
            assert client.tokens == oracle(client.request.prompt, self.sampling[client.id])
        self.bench.assert_nothing_left()

    def _watch_sends(self) -> None:
        """No request goes to a connection that has just failed it."""
        self.sampling: dict[str, Any] = {}
        for link in self.bench.links:
            self._watch(link)

    def _watch(self, link: FakeLink) -> None:
        send = link.send
        fleet = self.bench.fleet

        def checked(message: Any) -> None:
            if isinstance(message, (AddRequest, Reserve)):
                request = message.request if isinstance(message, Reserve) else message
                id = request.id.partition("~")[0]
                routed = fleet._requests[id]
                if id in self.sampling:
                    assert self.sampling[id] == request.sampling
                self.sampling[id] = request.sampling
                instance = fleet._instances[link.url]
                blame = routed.avoid.get(link.url)
                if blame is not None and (blame.boot, blame.epoch) == (
                    instance.boot,
                    instance.epoch,
                ):
                    assert self.bench.clock.now - blame.at >= BLAME_SECONDS
                assert instance.connected
            send(message)

        link.send = checked  # type: ignore[method-assign]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(roles=st.sampled_from(ROLES), events=EVENTS)
def test_any_schedule(roles: list[str], events: list[Event]) -> None:
    schedule = Schedule(roles)
    for event in events:
        schedule.apply(event)
    schedule.finish()
    schedule.check()
