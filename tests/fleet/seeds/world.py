"""One seed, one history: the real router before simulated instances that fail in every way.

A history has two parts. For a while requests come and faults happen, all drawn from the seed; then
the faults are over, and every request must end within a bound that is computed, with the tokens of
an instance that never fails, and leave nothing behind.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zlib import crc32

from pla_serve.fleet.control.control import ControlOptions, FleetControl
from pla_serve.fleet.link.protocol import LIVENESS_SECONDS, Role
from pla_serve.fleet.router.circuit import CircuitOptions
from pla_serve.fleet.router.contract import FleetOptions
from pla_serve.fleet.router.dispatch import BLAME_SECONDS
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.fleet.router.observers import WithControl
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.pools.balance import BalanceController
from pla_serve.policy.pools.pressure import PressureController
from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.server_options import ServedEvents, ServerOptions
from pla_serve.simulator.timeline import Timeline, VirtualTimer
from pla_serve.wire.engine import (
    Accepted,
    AddRequest,
    Output,
    Rejected,
    RequestAnswer,
    SamplingParams,
)
from tests.fleet.seeds.faulty import FaultyLink, FaultyServer
from tests.simulator.fleets import MACHINE

VOCABULARY = 50_000
SECONDS = 12.0
"""Requests come and faults happen for so long."""
ROLES: list[list[Role]] = [
    ["mixed"] * 3,
    ["mixed"] * 2,
    ["short", "long", "long"],
    ["short", "long", "decode", "decode"],
    ["mixed", "decode"],
    ["mixed", "mixed", "decode", "decode"],
]
FAULTS = {
    "death": 4,
    "death at once again": 1,
    "hang": 2,
    "stall": 1,
    "silence": 2,
    "broken connection": 3,
    "late reports": 3,
    "full": 3,
    "error": 4,
    "drain": 1,
    "role change": 3,
    "router restart": 1,
    "recall": 3,
    "notice": 3,
}
"""Kinds, and how often each is drawn. A stall is a hang of all instances at once."""


def next_token(digest: int) -> int:
    """The token that follows tokens with this checksum."""
    return (digest * 2654435761 >> 7) % VOCABULARY


def tokens_after(tokens: Sequence[int]) -> Iterator[int]:
    """The endless answer to a prompt: each token depends on all tokens before it."""
    digest = crc32(array("q", tokens).tobytes())
    while True:
        token = next_token(digest)
        yield token
        digest = crc32(array("q", (token,)).tobytes(), digest)


class SetCache:
    """Prefix cache of one instance: every prompt and answer of this life, in blocks of 16."""

    def __init__(self, prompts: Callable[[str], Sequence[int]]) -> None:
        self._prompts = prompts
        self._held: set[tuple[int, ...]] = set()

    def match(self, id: str, tokens: int) -> int:
        prompt = self._prompts(id)
        count = 0
        while count < len(prompt) and tuple(prompt[: count + 16]) in self._held:
            count += 16
        return min(count, len(prompt))

    def prefilled(self, id: str) -> None:
        prompt = self._prompts(id)
        self._held.update(tuple(prompt[:end]) for end in range(16, len(prompt) + 1, 16))

    def finished(self, id: str) -> None:
        """Answers are not cached."""

    def clear(self) -> None:
        self._held.clear()


@dataclass(eq=False)
class Client:
    """One request, from its first try to its end; it asks again when its router restarts."""

    world: World
    id: str
    prompt: list[int]
    tokens: int
    tenant: str
    tries: int = 1
    got: list[int] = field(default_factory=list)
    accepted: bool = False
    asked: float = 0.0
    """Time of its current try."""
    ended: float = 0.0
    end: str = ""

    @property
    def name(self) -> str:
        """Name of the request in its current try."""
        return f"{self.id}.{self.tries}"

    def ask(self) -> None:
        world = self.world
        self.got, self.accepted, self.asked = [], False, world.timeline.now
        request = AddRequest(
            id=self.name,
            prompt=self.prompt,
            sampling=SamplingParams(max_tokens=self.tokens, temperature=0.0),
            arrival=world.timeline.now,
            deadline=world.timeline.now + 0.5,
        )
        world.fleet.submit(request, Receiver(self, self.tries), self.tenant)

    def finish(self, end: str) -> None:
        assert not self.end, f"{self.name} was ended twice: {self.end}, {end}"
        self.end, self.ended = end, self.world.timeline.now
        self.world.note(f"{self.name} ended: {end}, {len(self.got)} tokens")


@dataclass(eq=False)
class Receiver:
    """Receives the messages of one try."""

    client: Client
    number: int

    def take(self, message: RequestAnswer) -> None:
        client = self.client
        assert self.number == client.tries, f"{client.name}: a message of an earlier try"
        assert not client.end, f"{client.name}: a message after the end"
        if isinstance(message, Accepted):
            assert not client.accepted, f"{client.name} was accepted twice"
            client.accepted = True
        elif isinstance(message, Rejected):
            assert not client.accepted, f"{client.name} was rejected after acceptance"
            client.finish("rejected")
        elif isinstance(message, Output):
            client.got += message.tokens
            client.world.check_tokens(client)
            if message.finish_reason is not None:
                error = f": {message.error}" if message.error else ""
                client.finish(message.finish_reason + error)

    def fail(self, failure: Exception) -> None:
        assert self.number == self.client.tries
        self.client.finish(f"failed: {failure}")


class Watch:
    """The router's observer: every decision becomes a line of the history."""

    def __init__(self, world: World) -> None:
        self._world = world

    def decided(self, seconds: float) -> None: ...
    def reported(self, link: Any, report: Any) -> None: ...
    def gone(self, link: Any) -> None: ...
    def began(self, attempt: Any, *what: Any) -> None:
        self._world.note(f"{attempt.id} began on {attempt.instance.name}")

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        self._world.note(f"a request was sent to {instance}, {seconds:.3f} s")

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        self._world.note(f"a request left {instance}: {reason}")

    def refused(self, reason: str) -> None:
        self._world.note(f"a request was refused: {reason}")

    def handed_over(self, outcome: str) -> None:
        self._world.counts[f"hand-over {outcome}"] += 1
        self._world.note(f"a hand-over: {outcome}")


class Router:
    """One life of the router process: its timers die with it."""

    def __init__(self, world: World) -> None:
        self.alive = True
        timeline = world.timeline

        def later(seconds: float, call: Callable[[], None]) -> VirtualTimer:
            return timeline.later(seconds, lambda: call() if self.alive else None)

        watch: Any = Watch(world)
        self.control: FleetControl | None = None
        if world.controller is not None:
            self.control = FleetControl(
                lambda: [server.link for server in world.servers],
                world.controller(),
                ControlOptions(period_seconds=1.0),
            )
            watch = WithControl(watch, self.control)
        self.fleet = Fleet(
            timeline.clock,
            later,
            watch,
            options=world.fleet_options,
            logger=logging.Logger("seeds", logging.CRITICAL),
        )


class World:
    """A fleet, its clients and its faults, all from one seed."""

    faults: Mapping[str, int] = FAULTS
    fault_rates: Sequence[float] = (0.3, 1.0, 2.0)
    fleets: Sequence[list[Role]] = ROLES
    answers: Sequence[int] = (1, 2, 5, 20)
    """Tokens of an answer."""
    transfer_chance = 0.4
    """Of a fleet without decode instances that can exchange KV."""
    graces: Sequence[float] = (0.5, 2.0, 4.0)
    """Seconds from a notice to the end."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"fleet/{seed}")
        rng = self.rng
        self.timeline = Timeline()
        self.history: list[str] = []
        self.counts: Counter[str] = Counter()
        self.clients: list[Client] = []
        self.servers: list[FaultyServer] = []
        self.by_id: dict[str, Client] = {}
        self.cancelled: set[str] = set()
        self.deaths: list[float] = []
        """Times at which instances died."""
        self.unlimited = rng.random() < 0.6
        """No request may be given up; otherwise the limits of real fleets hold."""
        self.fleet_options = FleetOptions(
            circuit=CircuitOptions(failures=rng.choice((1, 3))),
            max_predicted_wait=rng.choice((None, None, 2.0)),
            most_failures=10_000 if self.unlimited else 4,
            most_lost_engines=10_000 if self.unlimited else 2,
            patience_seconds=1e9 if self.unlimited else 5.0,
        )
        self.controller = rng.choice((None, BalanceController, PressureController))
        self.roles = rng.choice(self.fleets)
        self.policy = rng.choice(("length-aware", "fcfs"))
        self.transfers = "decode" in self.roles or rng.random() < self.transfer_chance
        self._router = Router(self)
        self._build()

    @property
    def fleet(self) -> Fleet:
        return self._router.fleet

    def note(self, text: str) -> None:
        """Add a line to the history."""
        self.history.append(f"{self.timeline.now:9.4f}  {text}")

    # Building

    def _build(self) -> None:
        self.note(f"roles {self.roles}, policy {self.policy}, {self.fleet_options}")
        options = ServerOptions(
            self._make_instance,
            lambda id, so_far, generated: tokens_after(so_far),
            MACHINE.profile,
            boundary_tokens=128,
            express=self.policy == "length-aware",
            kv_tokens=1600,
            kv_memory_tokens=MACHINE.kv_tokens,
            kv_bytes_per_token=1000,
            transfer="kv" if self.transfers else None,
            transfer_seconds=MACHINE.transfer,
            every_token=True,
            make_link=partial(FaultyLink, self.timeline, self.rng),
        )
        peers: dict[str, Any] = {}
        for number, role in enumerate(self.roles):
            name = f"i{number}"
            server = FaultyServer(
                name,
                role,
                options,
                SetCache(lambda id: self.by_id[id.partition(".")[0]].prompt),
                self.timeline,
                self.fleet,
                peers,
            )
            peers[name] = server
            self.servers.append(server)
            self.fleet.attach(server.link)
        for number, server in enumerate(self.servers):
            server.start()
            self.timeline.at(0.05 * number, server.report_regularly)
        self.timeline.at(1.0, self._tick)

    def _make_instance(self, events: ServedEvents) -> SimulatedInstance:
        spec, cost = parse_policy(self.policy), KnownCost(MACHINE.profile)
        return SimulatedInstance(
            spec.create(PolicyConfig(boundary_tokens=128), cost),
            MACHINE.cost,
            MACHINE.layers,
            events.prefilled,
            events.finished,
            decodes=True,
            started=events.started,
            decoded=events.decoded,
        )

    def _tick(self, _: object) -> None:
        for server in self.servers:
            self._reconnect_if_lost(server)
        control = self._router.control
        if control is not None:
            for move in control.tick(self.timeline.now, self.fleet.held_seconds):
                self.counts["move of a controller"] += 1
                self.note(f"controller: {move.instance_id} becomes {move.target.value}")
        self.timeline.at(self.timeline.now + 1.0, self._tick)

    # Course

    def run(self) -> None:
        """The whole history.

        Raises:
            AssertionError: something was lost, repeated, charged for ever, or waited too long.
        """
        rng = self.rng
        prefixes = [self._draw_tokens(rng.choice((0, 48, 200, 700))) for _ in range(3)]
        now = 0.0
        while (now := now + rng.expovariate(2.5)) < SECONDS:
            self.timeline.at(now, self._arrive, rng.choice(prefixes))
        now = 0.5
        rate = rng.choice(self.fault_rates)
        while (now := now + rng.expovariate(rate)) < SECONDS:
            (kind,) = rng.choices(list(self.faults), list(self.faults.values()))
            self.timeline.at(now, self._strike, kind)
        self._run_until(SECONDS)
        self._heal()
        bound = self._bound()
        self.note(f"faults are over; all must end within {bound:.1f} s")
        end = self.timeline.now + bound
        while self.timeline.now < end and not all(client.end for client in self.clients):
            self._run_until(min(end, self.timeline.now + 0.25))
        for client in self.clients:
            assert client.end, f"{client.name} has not ended after {bound:.1f} s"
            self._check_end(client)
        # Until what is said of the ends has come, and silence has been noticed.
        self._run_until(max(self.timeline.now, SECONDS + LIVENESS_SECONDS + 1.5) + 1.0)
        self._check_nothing_left()

    def _run_until(self, time: float) -> None:
        self.timeline.at(time, lambda _: self.timeline.stop())
        self.timeline.run()

    def _draw_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCABULARY) for _ in range(count)]

    def _arrive(self, prefix: list[int]) -> None:
        rng = self.rng
        prompt = [*prefix, *self._draw_tokens(rng.choice((1, 20, 60, 150, 600)))]
        id = f"r{len(self.clients)}"
        client = Client(self, id, prompt, rng.choice(self.answers), rng.choice("ab"))
        self.clients.append(client)
        self.by_id[id] = client
        self.note(f"{id} arrives: {len(prompt)} tokens, {client.tokens} wanted")
        client.ask()
        if rng.random() < 0.1:
            self.timeline.at(self.timeline.now + rng.uniform(0.0, 1.5), self._cancel, client)

    def _cancel(self, client: Client) -> None:
        if not client.end:
            self.counts["cancelled request"] += 1
            client.finish("cancelled")
            self.fleet.close(client.name)

    def check_tokens(self, client: Client) -> None:
        """Compare with an instance that never fails."""
        expected = tokens_after(client.prompt)
        for place, token in enumerate(client.got):
            assert token == next(expected), f"{client.name}: token {place} is wrong"
        assert len(client.got) <= client.tokens, f"{client.name} got too many tokens"

    # Faults

    def _strike(self, kind: str) -> None:
        rng, now = self.rng, self.timeline.now
        server = rng.choice(self.servers)
        self.note(f"fault: {kind} of {server.name}")
        if kind in ("death", "death at once again"):
            if not server.alive:
                return
            self._die(server, rng.uniform(0.1, 4.0))
            if kind == "death at once again":
                self.timeline.at(now + 4.05, lambda _: self._die(server, 0.2))
        elif kind == "hang":
            server.hang()
            self.timeline.at(now + rng.uniform(0.2, 5.0), lambda _: self._wake_up(server))
        elif kind == "stall":
            for each in self.servers:
                each.hang()
                self.timeline.at(now + 3.0, lambda _, each=each: self._wake_up(each))
        elif kind == "silence":
            link: Any = server.link
            link.silent = True
        elif kind == "broken connection":
            self._break(server)
        elif kind == "late reports":
            self._for_a_while(server.link, "late_reports")
        elif kind == "full":
            self._for_a_while(server, "full")
        elif kind == "error":
            if server.hung or not server.alive or not server.link.connected:
                return
            self.note(f"{server.name} fails {server.fail_one(rng)}")
        elif kind == "drain":
            server.change_draining(True)
            self.timeline.at(now + rng.uniform(0.2, 3.0), lambda _: server.change_draining(False))
        elif kind == "notice":
            self._give_notice(server, rng.choice(self.graces))
        elif kind == "role change":
            server.change_role(rng.choice(("mixed", "short", "long", "decode")))
        elif kind == "router restart":
            self._restart_router()
        elif kind == "recall":
            for name in server.not_begun():
                self.fleet.place_again(name.partition("~")[0])
        self.counts[kind] += 1

    def _give_notice(self, server: FaultyServer, grace: float) -> None:
        """Have an instance say that it will end, and end it then, unless the faults are over."""
        if server.ends_at is not None or not server.alive:
            return
        end = server.ends_at = self.timeline.now + grace
        server.report()

        def leave(_: object) -> None:
            if server.ends_at == end:
                server.ends_at = None
                others = [each for each in self.fleet.instances if each.open]
                if others and server.serving:
                    self.counts["instance that ended with requests"] += 1
                    self.note(f"{server.name} ends with {server.serving}")
                self._die(server, 0.5)

        self.timeline.at(end, leave)

    def _die(self, server: FaultyServer, down: float) -> None:
        if not server.alive:
            return
        server.hung = False
        self.deaths.append(self.timeline.now)
        server.fail("it died")
        for other in self.servers:
            if other is not server and other.alive:
                other.peer_failed(server.name)
        self.timeline.at(self.timeline.now + down, lambda _: self._start(server))

    def _start(self, server: FaultyServer) -> None:
        if not server.alive:
            self.note(f"{server.name} starts")
            server.start()

    def _wake_up(self, server: FaultyServer) -> None:
        if server.hung:
            self.note(f"{server.name} goes on")
            server.wake_up()
        self._reconnect_if_lost(server)

    def _break(self, server: FaultyServer) -> None:
        if server.alive and server.link.connected:
            server.link.cut("the connection broke")
            self.timeline.at(
                self.timeline.now + self.rng.uniform(0.05, 1.0),
                lambda _: self._reconnect_if_lost(server),
            )

    def _reconnect_if_lost(self, server: FaultyServer) -> None:
        if server.alive and not server.hung and not server.link.connected:
            self.note(f"{server.name} is connected again")
            server.reconnect()

    def _for_a_while(self, what: Any, flag: str) -> None:
        setattr(what, flag, True)
        self.timeline.at(
            self.timeline.now + self.rng.uniform(0.3, 3.0), lambda _: setattr(what, flag, False)
        )

    def _restart_router(self) -> None:
        self._router.alive = False
        old = [client for client in self.clients if not client.end]
        for client in old:
            client.tries += 1
        self._router = Router(self)
        for server in self.servers:
            server.attach(self.fleet)
            self.fleet.attach(server.link)
        for server in self.servers:
            if server.alive and not server.hung:
                server.reconnect()
        for client in old:
            client.ask()

    def _heal(self) -> None:
        """The faults are over; what they did is mended as fast as real fleets mend it."""
        for server in self.servers:
            link: Any = server.link
            link.late_reports = False
            server.full = server.hung = False
            server.ends_at = None
            server.change_draining(False)
            if not server.alive:
                server.start()
            else:
                server.wake_up()

    def _bound(self) -> float:
        """Seconds until every request must have ended.

        Silence is noticed and a connection made anew (once for what was silent before, once for
        what is silent now), blame is forgotten, those that were told to come again have come; and
        one instance does all work that is left, twice, because half of it may be lost to what was
        noticed late.
        """
        cost = KnownCost(MACHINE.profile)
        work = sum(
            cost.prefill_seconds(len(client.prompt) + client.tokens, 0)
            + client.tokens * cost.work_seconds(1, 800, 800, 1, 1)
            for client in self.clients
            if not client.end
        )
        noticed = 2 * (LIVENESS_SECONDS + 0.5) + 2 * BLAME_SECONDS
        return noticed + self.fleet_options.lease_seconds + 2.0 + 2 * work

    # Ends

    def _check_end(self, client: Client) -> None:
        kind, _, _ = client.end.partition(":")
        self.counts[f"ended: {kind}"] += 1
        if client.end == "cancelled":
            return
        if client.end == "rejected":
            assert not client.got
        elif client.end == "length":
            assert len(client.got) == client.tokens
        else:
            given_up = ("error: given up", "failed: given up", "failed: no instance")
            assert client.end.startswith(given_up), client.end
            assert not self.unlimited, f"{client.name} was given up: {client.end}"
            if client.end.startswith("error: given up, because 2 instances ended"):
                deaths = [at for at in self.deaths if client.asked <= at <= client.ended]
                assert len(deaths) >= 2, f"{client.name} was given up, but nothing had ended twice"

    def _check_nothing_left(self) -> None:
        fleet, now = self.fleet, self.timeline.now
        assert (fleet.in_flight, fleet.parked) == (0, 0)
        assert fleet.dispatcher.charges == 0, "a request is still charged"
        for instance in fleet.instances:
            assert not instance.attempts, f"attempts are left on {instance.name}"
            assert instance.open, f"{instance.name} is not back"
            assert instance.circuit.allows(now + 61.0), f"{instance.name} is barred for ever"
        for kept in fleet.dispatcher.prefixes._instances.values():
            assert not kept.pending, "a prompt is believed to be on its way for ever"
        assert not fleet._suspects._apart, "an instance is kept from suspects for ever"
        for tenant in "ab":
            assert fleet.shares.outstanding(tenant) == 0.0, f"{tenant} is charged for ever"
        for server in self.servers:
            assert server.idle, f"{server.name} holds something that nobody wants"


@dataclass(frozen=True)
class Outcome:
    """Result of one seed."""

    seed: int
    error: str
    """Empty if all invariants held."""
    counts: Counter[str]
    requests: int
    history: list[str]

    @property
    def digest(self) -> str:
        """Checksum of the history."""
        return f"{crc32(chr(10).join(self.history).encode()):08x}"


def play(seed: int) -> Outcome:
    """One seed's history, and what was wrong with it."""
    world = World(seed)
    error = ""
    try:
        world.run()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        world.note(error)
    return Outcome(seed, error, world.counts, len(world.clients), world.history)


def replay_command(seed: int) -> str:
    """The command that shows a seed's history."""
    return f"python benchmarks/fleet_seeds.py --seed {seed} --history"
