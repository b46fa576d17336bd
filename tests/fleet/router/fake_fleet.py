"""A fleet of fake instances on a fake clock, and the tokens that a model without noise would make.

The next token depends on all tokens before it, so that a stream that skips, repeats or invents one
goes wrong from there on and is caught.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from zlib import crc32

from pla_serve.fleet.link.protocol import InstanceFacts, InstanceReport, LinkDown, LossCause
from pla_serve.fleet.router.contract import FleetOptions
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Begin,
    EngineLoad,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    RequestAnswer,
    Reserve,
    SamplingParams,
)
from pla_serve.wire.kv_offer import bind

LOAD = set(EngineLoad.__struct_fields__)

VOCABULARY = 1000


def next_token(tokens: list[int], seed: int | None) -> int:
    return crc32(repr((tokens, seed)).encode()) % VOCABULARY


def oracle(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """All output of a request on an instance that never fails."""
    tokens = list(prompt)
    for _ in range(sampling.max_tokens):
        tokens.append(next_token(tokens, sampling.seed))
    return tokens[len(prompt) :]


class Clock:
    """Time and timers that move only when told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self._timers: list[tuple[float, int, Any, list[bool]]] = []
        self._serial = count()

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Any) -> Any:
        alive = [True]
        heapq.heappush(self._timers, (self.now + seconds, next(self._serial), call, alive))

        class Handle:
            def cancel(self) -> None:
                alive[0] = False

        return Handle()

    @property
    def pending(self) -> int:
        return sum(alive[0] for *_, alive in self._timers)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, call, alive = heapq.heappop(self._timers)
            if alive[0]:
                alive[0] = False
                call()
        self.now = end


@dataclass
class Job:
    """A request as an instance has it."""

    tokens: list[int]
    left: int
    sampling: SamplingParams
    seen: bool = False
    hand_over: bool = False
    begun: bool = True


@dataclass
class FakeLink:
    """One instance and the link to it. What it sends waits in `outbox` until `flush`."""

    url: str
    fleet: Any = None
    kind: str = "pla"
    transfer: str | None = None
    connected: bool = False
    boot: int = 0
    refuse: bool = False
    """Everything, with retry_after."""
    jobs: dict[str, Job] = field(default_factory=dict)
    outbox: list[RequestAnswer] = field(default_factory=list)
    received: list[Any] = field(default_factory=list)
    offers: set[str] = field(default_factory=set)
    """Of KV that is kept for others."""
    facts: InstanceFacts | None = None
    last_report: InstanceReport | None = None
    role: str = "mixed"

    def connect(self, boot: int | None = None) -> None:
        self.connected = True
        self.boot = self.boot if boot is None else boot
        self.facts = InstanceFacts(
            boot=f"{self.url}-{self.boot}",
            kind=self.kind,
            model="m",
            max_model_len=4096,
            vocab_size=VOCABULARY,
            kv_tokens=1600,
            block_tokens=16,
            resumes=True,
            transfer=self.transfer,
            transfer_agent=f"agent of {self.url}",
            kv_bytes_per_token=1000,
        )
        self.fleet.connected(self, self.facts)
        self.report()

    def report(self, **fields: Any) -> None:
        load = EngineLoad(**{name: fields.pop(name) for name in LOAD & fields.keys()})
        state = {"role": self.role, "ready": True, "draining": False, **fields}
        report = InstanceReport(**state, load=load)
        self.last_report = report
        self.fleet.report(self, report)

    def cut(self, *, restart: bool = False, cause: LossCause = LossCause.BROKEN) -> None:
        """The connection ends; the instance drops what is in flight."""
        self.connected = False
        self.jobs.clear()
        self.outbox.clear()
        self.offers.clear()
        if restart:
            self.boot += 1
        self.fleet.lost(self, "cut", cause)

    def send(self, message: Any) -> None:
        if not self.connected:
            raise LinkDown(self.url)
        self.received.append(message)
        if isinstance(message, AddRequest):
            self._add(message)
        elif isinstance(message, AbortRequest):
            self.jobs.pop(message.id, None)
            self.offers.discard(message.id)
            self.outbox = [item for item in self.outbox if item.id != message.id]
        elif isinstance(message, Reserve):
            assert message.source == bind(b"kv", f"agent of {self.url}"), "not bound to this reader"
            self._add(message.request, reserved=True)
        elif isinstance(message, Begin):
            self._begin(message)
        elif isinstance(message, Lend):
            self.offers.add(message.id)
            self.outbox.append(Offer(id=message.id, source=b"kv", tokens=len(message.tokens)))
        elif isinstance(message, Release):
            self.offers.discard(message.id)

    def step(self, tokens: int = 1) -> None:
        """Every running job makes so many tokens."""
        for id, job in list(self.jobs.items()):
            if job.begun:
                self._make(id, job, tokens)

    def flush(self, most: int | None = None) -> None:
        """Deliver what was sent, in order."""
        for _ in range(len(self.outbox) if most is None else min(most, len(self.outbox))):
            if not self.connected or not self.outbox:
                return
            self.fleet.message(self, self.outbox.pop(0))

    def error(self, id: str) -> None:
        del self.jobs[id]
        self.outbox.append(Output(id=id, tokens=[], finish_reason="error", error="bad luck"))

    def expire(self, id: str) -> None:
        """A reservation's lease ends."""
        if id in self.jobs and not self.jobs[id].begun:
            self.error(id)

    def _add(self, request: AddRequest, reserved: bool = False) -> None:
        assert request.id not in self.jobs, "the same name twice"
        if self.refuse:
            self.outbox.append(Rejected(id=request.id, reason="full", retry_after=1.0))
            return
        self.outbox.append(Accepted(request.id, 0))
        wants = request.hand_over is not None and not reserved
        self.jobs[request.id] = Job(
            list(request.prompt),
            request.sampling.max_tokens - request.generated,
            request.sampling,
            hand_over=wants,
            begun=not reserved,
        )
        if wants:
            self.offers.add(request.id)
            self.outbox.append(Offer(id=request.id, source=b"kv", tokens=len(request.prompt)))

    def _begin(self, message: Begin) -> None:
        job = self.jobs.get(message.id)
        if job is None:
            self.outbox.append(Rejected(id=message.id, reason="no such", retry_after=None))
            return
        job.tokens += message.tokens
        job.left -= len(message.tokens)
        job.begun = True

    def _make(self, id: str, job: Job, most: int) -> None:
        made: list[int] = []
        for _ in range(min(most, job.left)):
            token = next_token(job.tokens, job.sampling.seed)
            job.tokens.append(token)
            made.append(token)
            job.left -= 1
            if job.hand_over:
                break
        finish: Any = None if job.left else "length"
        if job.hand_over and job.left:
            finish = "handed_over"
        cached = None if job.seen else 0
        job.seen = True
        if finish:
            del self.jobs[id]
        self.outbox.append(Output(id=id, tokens=made, finish_reason=finish, cached_tokens=cached))


class Recorder:
    """A fleet's observer."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, str, bool]] = []
        self.refusals: list[str] = []
        self.sent: list[str] = []
        self.hand_overs: list[str] = []

    def decided(self, seconds: float) -> None: ...

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        self.sent.append(instance)

    def began(self, *what: Any) -> None: ...

    def reported(self, link: Any, report: Any) -> None: ...

    def gone(self, link: Any) -> None: ...

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        self.moves.append((instance, reason, resumed))

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def handed_over(self, outcome: str) -> None:
        self.hand_overs.append(outcome)


class Client:
    """The receiver of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: list[str] = []
        self.errors: list[str] = []
        self.accepted = 0
        self.rejected: Rejected | None = None

    @property
    def ended(self) -> bool:
        return bool(self.ends)

    def take(self, message: RequestAnswer) -> None:
        assert not self.ends, "news after the end"
        if isinstance(message, Accepted):
            assert not self.tokens
            self.accepted += 1
        elif isinstance(message, Rejected):
            self.rejected = message
            self.ends.append("rejected")
        elif isinstance(message, Output):
            self.tokens += message.tokens
            if message.error is not None:
                self.errors.append(message.error)
            if message.finish_reason is not None:
                self.ends.append(message.finish_reason)

    def fail(self, failure: Exception) -> None:
        assert not self.ends
        self.ends.append(f"failed: {failure}")


class Bench:
    """A fleet with so many instances, connected."""

    def __init__(self, instances: int = 3, **options: Any) -> None:
        self.clock = Clock()
        self.seen = Recorder()
        routing = options.pop("routing", None)
        roles = options.pop("roles", None) or ["mixed"] * instances
        apart = options.pop("transfer", False) or "decode" in roles
        self.fleet = Fleet(
            self.clock,
            self.clock.later,
            self.seen,
            options=FleetOptions(**options),
            routing=routing,
        )
        self.links = [
            FakeLink(f"i{n}", self.fleet, role=role, transfer="t" if apart else None)
            for n, role in enumerate(roles)
        ]
        for link in self.links:
            self.fleet.attach(link)  # type: ignore[arg-type]
            link.connect()
        self._serial = count()

    def submit(
        self,
        prompt: list[int],
        tokens: int = 4,
        tenant: str = "",
        cache_scope: str = "",
        **sampling: Any,
    ) -> Any:
        client = Client()
        client.id = f"r{next(self._serial)}"  # type: ignore[attr-defined]
        request = AddRequest(
            id=client.id,  # type: ignore[attr-defined]
            prompt=prompt,
            sampling=SamplingParams(max_tokens=tokens, **{"temperature": 0, **sampling}),
            arrival=self.clock(),
            cache_scope=cache_scope,
        )
        client.request = request  # type: ignore[attr-defined]
        self.fleet.submit(request, client, tenant)
        return client

    def where(self, client: Any) -> FakeLink:
        """The instance that it is on."""
        found = [
            link
            for link in self.links
            if any(id.partition("~")[0] == client.id for id in link.jobs)
        ]
        assert len(found) == 1
        return found[0]

    def run(self, rounds: int = 100) -> None:
        """Until all is quiet."""
        for _ in range(rounds):
            for link in self.links:
                if link.connected:
                    link.step()
                    link.flush()

    def assert_nothing_left(self) -> None:
        """No charge, record, timer, job or offer remains."""
        fleet = self.fleet
        assert (fleet.in_flight, fleet.parked) == (0, 0)
        assert fleet.dispatcher.charges == 0
        assert all(not instance.attempts for instance in fleet.instances)
        assert all(not kept.pending for kept in fleet.dispatcher.prefixes._instances.values())
        assert fleet.shares.outstanding("") == 0
        assert self.clock.pending == 0
        for link in self.links:
            assert not link.jobs
            assert not link.offers
