"""Several routers before the same instances: none of them knows what the others send."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

from pla_serve.fleet.link.protocol import InstanceFacts, InstanceReport
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.policy.cost import CostProfile
from pla_serve.wire.engine import Accepted, AddRequest, EngineLoad, Output, SamplingParams
from tests.fleet.router.fake_fleet import VOCABULARY, Client, Clock, Recorder

SECONDS_PER_TOKEN = 1e-3
COST = CostProfile(SECONDS_PER_TOKEN, 0, 0, 0, 0)


class Machine:
    """Prefills one request after the other, for all routers; its clock is theirs."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.busy_until = 0.0

    @property
    def queued(self) -> float:
        return max(0.0, self.busy_until - self.clock.now)


class SharedLink:
    """One router's link to one machine."""

    def __init__(self, machine: Machine, fleet: Fleet) -> None:
        self.machine = machine
        self.fleet = fleet
        self.url = machine.name
        self.connected = True
        self.facts = InstanceFacts(
            boot="1",
            kind="pla",
            model="m",
            max_model_len=4096,
            vocab_size=VOCABULARY,
            kv_tokens=160,
            block_tokens=16,
        )

    def send(self, message: Any) -> None:
        assert isinstance(message, AddRequest)
        machine, now = self.machine, self.machine.clock.now
        machine.busy_until = max(machine.busy_until, now)
        machine.busy_until += SECONDS_PER_TOKEN * len(message.prompt)
        machine.clock.later(machine.busy_until - now, lambda: self.end(message.id))
        self.fleet.message(self, Accepted(message.id, 0))  # type: ignore[arg-type]

    def end(self, id: str) -> None:
        output = Output(id=id, tokens=[7], finish_reason="length", cached_tokens=0)
        self.fleet.message(self, output)  # type: ignore[arg-type]

    def report(self) -> None:
        report = InstanceReport(
            role="mixed",
            ready=True,
            draining=False,
            load=EngineLoad(queued_long_seconds=self.machine.queued, cost=COST, boundary_tokens=1),
        )
        self.fleet.report(self, report)  # type: ignore[arg-type]


def mean_wait(routers: int, seed: int) -> float:
    """Seconds to the first token, with requests dealt out to the routers at random."""
    rng, clock = random.Random(seed), Clock()
    machines = [Machine(f"i{n}", clock) for n in range(4)]
    fleets = [Fleet(clock, clock.later, Recorder()) for _ in range(routers)]
    links = [SharedLink(machine, fleet) for fleet in fleets for machine in machines]
    for link in links:
        link.fleet.attach(link)  # type: ignore[arg-type]
        link.fleet.connected(link, link.facts)  # type: ignore[arg-type]

    def beat() -> None:
        for link in links:
            link.report()
        clock.later(0.2, beat)

    beat()
    waits: list[float] = []

    class Timed(Client):
        def __init__(self) -> None:
            super().__init__()
            self.began = clock.now

        def take(self, message: Any) -> None:
            super().take(message)
            if self.ended:
                waits.append(clock.now - self.began)

    for number in range(600):
        clock.advance(rng.expovariate(0.75 * 4 / 0.4))
        sampling = SamplingParams(max_tokens=1, temperature=0)
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(50, 750))]
        request = AddRequest(id=f"r{number}", prompt=prompt, sampling=sampling, arrival=clock.now)
        rng.choice(fleets).submit(request, Timed(), "")
    clock.advance(100.0)
    assert len(waits) == 600
    assert all(fleet.in_flight == fleet.dispatcher.charges == 0 for fleet in fleets)
    return fmean(waits)


def test_replicas_are_nearly_as_good_as_one_router() -> None:
    one = fmean(mean_wait(1, seed) for seed in range(3))
    three = fmean(mean_wait(3, seed) for seed in range(3))
    assert three < 1.25 * one
