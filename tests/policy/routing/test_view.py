"""The arrays against slow accounts, over random lives of a fleet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.predicted import Predicted
from pla_serve.policy.routing.request import FleetModel, NoInstance, RouteRequest
from pla_serve.policy.routing.router import Router
from pla_serve.policy.routing.view import TIE
from tests.policy.routing.reference import SlowFleet, SlowInstance

pools = st.sampled_from([Pool.SHORT, Pool.LONG, Pool.MIXED])
seconds = st.floats(0, 5)


class FleetLife(RuleBasedStateMachine):
    instances: Bundle[str] = Bundle("instances")
    requests: Bundle[str] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.slow = SlowFleet(boundary=100, express=True)
        self.router = Router(
            Predicted(others=0.0), FleetModel(lambda new, history: new * 1e-3, 100)
        )

    @rule(target=instances, pool=pools)
    def add(self, pool: Pool) -> str:
        self.count += 1
        name = f"i{self.count}"
        self.router.added(name, pool, self.now)
        self.slow.instances[name] = SlowInstance(pool, self.now, self.now)
        return name

    @rule(name=consumes(instances))
    def remove(self, name: str) -> None:
        held = self.router.removed(name)
        assert set(held) == self.slow.instances.pop(name).unfinished

    @rule(name=instances, pool=pools)
    def move(self, name: str, pool: Pool) -> None:
        if name in self.slow.instances:
            self.router.moved(name, pool)
            self.slow.instances[name].pool = pool

    @rule(pause=st.floats(0.001, 3))
    def pass_time(self, pause: float) -> None:
        self.now += pause

    @rule(target=requests, tokens=st.integers(1, 3000), data=st.data())
    def dispatch(self, tokens: int, data: st.DataObject) -> str:
        self.count += 1
        names = sorted(self.slow.instances)
        cached = {}
        if names:
            cached = data.draw(
                st.dictionaries(st.sampled_from(names), st.integers(0, 3000), max_size=3)
            )
        request = RouteRequest(f"r{self.count}", tokens, cached)
        if not names:
            with pytest.raises(NoInstance):
                self.router.choose(request, self.now)
            return request.id
        chosen = self.router.choose(request, self.now)
        best = min(self.slow.ttft(request, name, self.now) for name in names)
        # Long work decides between equal express queues, by a small weight.
        slack = TIE * float(np.ptp(self.router.view.ready)) + 1e-9
        assert best - 1e-9 <= self.slow.ttft(request, chosen, self.now) <= best + slack
        place = self.router.dispatched(request, chosen, self.now)
        assert place.new_tokens == self.slow.uncached(request, chosen)
        self.slow.dispatched(request, chosen, self.now)
        return request.id

    @rule(request_id=requests)
    def prefill(self, request_id: str) -> None:
        self.router.prefilled(request_id, self.now)
        for instance in self.slow.instances.values():
            instance.done(request_id, self.now)

    @rule(request_id=consumes(requests))
    def finish(self, request_id: str) -> None:
        self.router.finished(request_id, self.now)
        for instance in self.slow.instances.values():
            instance.done(request_id, self.now)
            instance.unfinished.discard(request_id)

    @rule(name=instances, total=seconds, share=st.floats(0, 1), age=st.floats(0, 2))
    def report(self, name: str, total: float, share: float, age: float) -> None:
        self.router.reported(name, total, total * share, self.now - age)
        if name in self.slow.instances:
            self.slow.report(name, total, total * share, self.now - age)

    @invariant()
    def accounts_agree(self) -> None:
        view = self.router.view
        assert [entry.id for entry in view.entries] == list(self.slow.instances)
        for index, slow in enumerate(self.slow.instances.values()):
            assert view.entries[index].index == index
            assert view.requests[index] == len(slow.unfinished)
            assert view.tokens[index] == slow.tokens
            assert view.short_waiting[index] == slow.short_waiting
            for short in (True, False):
                express = short and view.model.express
                expected = slow.wait(express, self.now, self.slow.boundary * 1e-3)
                assert view.wait(index, short, self.now) == pytest.approx(expected)
            assert view.ready[index] == pytest.approx(slow.ready)
            assert view.express_ready[index] == pytest.approx(slow.express_ready)
        for pool in (Pool.SHORT, Pool.LONG):
            members = [view.entries[n].id for n in view.members(pool)]
            assert members == [
                name for name, i in self.slow.instances.items() if i.pool in (pool, Pool.MIXED)
            ]


TestFleetLife = FleetLife.TestCase
TestFleetLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("express", [True, False])
def test_what_is_late_is_not_taken_for_idle(express: bool) -> None:
    """A second after it should have been done, nobody knows how much longer it takes."""
    model = FleetModel(lambda new, history: new * 1e-3, express=express)
    router = Router(Predicted(), model)
    for name in ("a", "b"):
        router.added(name, Pool.MIXED, 0.0)
    router.dispatched(RouteRequest("r0", 100), "a", 0.0)
    router.dispatched(RouteRequest("r1", 200), "b", 0.0)
    router.prefilled("r1", 0.2)
    assert router.view.wait(0, True, 1.1) == pytest.approx(1.0)
    assert router.choose(RouteRequest("r2", 100), 1.1) == "b", "though a was to be done sooner"
    router.prefilled("r0", 1.1)
    assert router.view.wait(0, True, 1.2) == 0.0
