"""Whatever is stopped, killed, delayed or lost between two engines: right tokens, no block lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    Begin,
    Offer,
    Outbound,
    Output,
    Rejected,
    Release,
)
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import BLOCK, VOCABULARY, expected
from tests.engine.transfer.world import Node, World, at_rest, request, reserve, watch

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS = 6
LEASE = 0.4


@dataclass
class Job:
    """One request as a router sees it."""

    prompt: tuple[int, ...]
    got: list[int] = field(default_factory=list)
    taken: bool = False
    """The decode engine has accepted a reservation."""
    begun: bool = False
    finished: bool = False
    aborted: bool = False
    life: tuple[int, int] = (0, 0)
    """Lives of the two engines when the request was sent."""


class Router:
    """Passes messages between a prefill and a decode engine, and starts again what is lost.

    Every send may be late, which is what a router's queue does; none is lost, because a link that
    loses messages is cut, which kills all that went over it.
    """

    def __init__(self, world: World, rng: Random, blocks: int) -> None:
        self.world = world
        self.rng = rng
        self.blocks = blocks
        self.lives = [0, 0]
        self.stopped: set[int] = set()
        self.nodes: list[Node] = [self._start(0), self._start(1)]
        self.jobs: dict[str, Job] = {}
        self.attempts: Counter[str] = Counter()
        watch(self.nodes, world.wire)

    def _start(self, number: int) -> Node:
        policy = ChaosPolicy(self.rng.randrange(2**32))
        node = self.world.node(number, policy, blocks=self.blocks)
        node.engine.on_poll.append(self.meanwhile)
        return node

    def add(self, name: str, prompt: tuple[int, ...]) -> None:
        self.jobs[name] = Job(prompt)
        self._prefill(name)

    def abort(self, name: str) -> None:
        self.jobs[name].aborted = True
        for node in self.nodes:
            node.engine.inbox.append(AbortRequest(name))

    def kill(self, number: int) -> None:
        """End the process of an engine, in the middle of whatever it does, and start another."""
        if self.nodes[number].busy:
            return
        self.world.wire.kill(self.nodes[number].name)
        self.stopped.discard(number)
        self.lives[number] += 1
        self.nodes[number] = self._start(number)
        for name, job in list(self.jobs.items()):
            if job.finished or job.aborted:
                continue
            if number == 0 and not job.begun and not job.got:
                if job.taken and self.rng.random() < 0.5:
                    self._begin(name)
                else:
                    self._again(name)
            elif number == 1 and (job.begun or job.taken):
                job.taken = False
                if job.begun:
                    self._again(name)

    def meanwhile(self) -> None:
        """Anything may happen between two layers of one engine."""
        for _ in range(self.rng.randint(0, 3)):
            self.rng.choice((self._deliver, self._read, self._pass_on, self._step, self._time))()

    def _deliver(self) -> None:
        self.world.wire.deliver(self.rng)

    def _read(self) -> None:
        number = self.rng.randrange(2)
        if number not in self.stopped:
            self.nodes[number].reader.step()

    def _step(self) -> None:
        number = self.rng.randrange(2)
        if number not in self.stopped:
            self.nodes[number].step()

    def _time(self) -> None:
        self.world.clock.now += self.rng.choice((0.0, 0.001, 0.05))

    def _pass_on(self) -> None:
        number = self.rng.randrange(2)
        for message in self.nodes[number].news():
            self._heard(number, message)

    def _heard(self, number: int, message: Outbound) -> None:
        job = self.jobs.get(getattr(message, "id", ""))
        if job is None or job.aborted or job.finished:
            return
        assert not isinstance(message, Accepted | Offer | Output | Rejected) or message.id
        if isinstance(message, Offer):
            if not job.begun and number == 0:
                reserve(self.nodes[1], request(message.id, job.prompt, max_tokens=TOKENS),
                        message.source, LEASE)  # fmt: skip
        elif isinstance(message, Accepted):
            job.taken |= number == 1 and not job.begun
        elif isinstance(message, Rejected):
            self._refused(number, message, job)
        elif isinstance(message, Output):
            self._output(number, message, job)

    def _refused(self, number: int, message: Rejected, job: Job) -> None:
        if "runs already" in message.reason:
            return
        if number == 1 and not job.begun:
            job.taken = False
        else:
            self._again(message.id)

    def _output(self, number: int, message: Output, job: Job) -> None:
        if number == 0 and job.begun:
            return  # it has been given up there
        if message.finish_reason == "error":
            assert "nobody began" in (message.error or ""), message.error
            job.taken = False
            return
        job.got += message.tokens
        if number == 1:
            self.nodes[0].engine.inbox.append(Release(message.id))
        if message.finish_reason == "handed_over":
            if job.taken:
                self._begin(message.id)
            else:
                self._again(message.id)
        elif message.finish_reason is not None:
            job.finished = True
            if number == 0:
                self.nodes[1].engine.inbox.append(AbortRequest(message.id))

    def _begin(self, name: str) -> None:
        job = self.jobs[name]
        job.begun = True
        self.nodes[1].engine.inbox.append(Begin(id=name, tokens=list(job.got)))

    def _prefill(self, name: str) -> None:
        job = self.jobs[name]
        self.nodes[0].engine.inbox.append(request(name, job.prompt, lease=LEASE, max_tokens=TOKENS))

    def _again(self, name: str) -> None:
        """On the decode engine alone, from the tokens that the client has."""
        job = self.jobs.pop(name)
        self.attempts[name.split("/")[0]] += 1
        for node in self.nodes:
            node.engine.inbox.append(AbortRequest(name))
        fresh = f"{name.split('/')[0]}/{self.attempts[name.split('/')[0]]}"
        self.jobs[fresh] = Job(job.prompt, job.got, taken=True, begun=True)
        add = request(fresh, (*job.prompt, *job.got), max_tokens=TOKENS)
        add = msgspec.structs.replace(add, generated=len(job.got))
        self.nodes[1].engine.inbox.append(add)


def prompts(rng: Random, count: int) -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = []
    for _ in range(count):
        length = rng.choice((1, BLOCK, 13, 40, 70))
        own = tuple(rng.randrange(1, VOCABULARY) for _ in range(length))
        if made and rng.random() < 0.5:
            base = rng.choice(made)
            own = base[: rng.randint(1, len(base))] + own
        made.append(own[:90])
    return made


@PATIENT
@given(
    seed=st.integers(0, 2**32),
    tight=st.booleans(),
    faults=st.sampled_from(("none", "stops", "kills", "all")),
)
def test_any_faults(seed: int, tight: bool, faults: str) -> None:
    rng = Random(seed)
    world = World()
    router = Router(world, rng, blocks=rng.randint(40, 70) if tight else 256)
    waiting = prompts(rng, 6)
    wanted = {f"r{i}": prompt for i, prompt in enumerate(waiting)}
    left = list(wanted.items())
    aborted: set[str] = set()
    for _ in range(300):
        if left and rng.random() < 0.1:
            router.add(*left.pop())
        if faults != "none" and rng.random() < 0.03:
            fault(router, rng, faults)
        if rng.random() < 0.005 and router.jobs:
            name = rng.choice(sorted(router.jobs))
            router.abort(name)
            aborted.add(name.split("/")[0])
        router.meanwhile()
    router.stopped.clear()
    for item in left:
        router.add(*item)
    world.wire.stuck.clear()
    for _ in range(3000):
        router.meanwhile()
        for number in (0, 1):
            router.nodes[number].reader.step()
            router.nodes[number].step()
            for message in router.nodes[number].news():
                router._heard(number, message)
        if rng.random() < 0.05:
            world.wire.settle()
        if all(job.finished or job.aborted for job in router.jobs.values()):
            break
    for name, job in router.jobs.items():
        base = name.split("/")[0]
        right = expected("llama", wanted[base], TOKENS)
        if base in aborted:
            assert tuple(job.got) == right[: len(job.got)]
        else:
            assert tuple(job.got) == right, name
    world.clock.now += 2 * LEASE
    for node in router.nodes:
        node.engine.on_poll.clear()
    world.move(*router.nodes)
    for node in router.nodes:
        at_rest(node)


def fault(router: Router, rng: Random, faults: str) -> None:
    number = rng.randrange(2)
    kinds = {"stops": ("stop", "stick"), "kills": ("kill",), "all": ("stop", "stick", "kill")}
    kind = rng.choice(kinds[faults])
    if kind == "kill":
        router.kill(number)
    elif kind == "stick":
        router.world.wire.stuck ^= {router.nodes[number].name}
    elif number in router.stopped:
        router.stopped.discard(number)
        # It was away for longer than any lease.
        router.world.clock.now += rng.choice((0.0, 2 * LEASE))
    else:
        router.stopped.add(number)
