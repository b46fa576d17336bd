"""A simulated instance as routers see it: it obeys the messages of a link on virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from msgspec import structs

from pla_serve.fleet.link.protocol import (
    Inbound,
    InstanceFacts,
    InstanceReport,
    LinkEvents,
    LossCause,
    RequestAnswer,
    Role,
)
from pla_serve.policy.admission import Refuse
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.server_options import ServerCache, ServerOptions
from pla_serve.simulator.timeline import Timeline
from pla_serve.simulator.totals import Totals
from pla_serve.wire import engine as wire
from pla_serve.wire.kv_offer import sign, verify
from pla_serve.wire.statistics import EngineLoad

SECRET = b"the secret of a simulated fleet!"


@dataclass(slots=True)
class _Served:
    """A request that is prefilled or decoded."""

    request: wire.AddRequest
    job: SimulatedRequest
    tokens: Iterator[int]
    left: int
    """Tokens until the answer is complete."""
    sent: int = 0
    """Tokens that were sent by this instance, or before it took the request over."""


@dataclass(slots=True)
class _Reserved:
    """A request that another instance is to hand over, or lends KV for."""

    request: wire.AddRequest
    address: bytes
    since: float
    begun: bool = False
    tokens: list[int] = field(default_factory=list)
    """Output of the other instance, from `Begin`."""


class SimulatedServer:
    """One instance: its engine and cache, its role, and a link to a router.

    Args:
        peers: all instances of the fleet by name, for KV transfer.
        admitted: called with the name of a request, its new tokens, its history and how many tokens
            of that were read from another instance, when it is queued for its prefill.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        options: ServerOptions,
        cache: ServerCache,
        timeline: Timeline,
        owner: LinkEvents,
        peers: Mapping[str, SimulatedServer],
        admitted: Callable[[str, int, int, int], None] = lambda id, new, history, fetched: None,
    ) -> None:
        self.name = name
        self.role: Role = role
        self.link = options.make_link(
            name, owner, self.receive, self.change_role, self.change_draining
        )
        self.totals = Totals()
        self.alive = False
        self.life = 0
        """Number of the current or next life."""
        self._options = options
        self._cache = cache
        self._timeline = timeline
        self._peers = peers
        self._admitted = admitted
        self._draining = False
        self.ends_at: float | None = None
        """The time at which it was told to end, or None. With one it takes nothing new."""
        self._served: dict[str, _Served] = {}
        self._reserved: dict[str, _Reserved] = {}
        self._outbox: list[RequestAnswer] = []
        self._scheduled = inf
        """Time of the earliest event that wakes the engine."""
        self.engine = options.make_instance(self)

    # Life

    def start(self) -> None:
        """Begin a life: connect to the router and report."""
        self.alive = True
        options = self._options
        self.link.connect(
            InstanceFacts(
                boot=f"{self.name}/{self.life}",
                kind="pla",
                model="simulated",
                max_model_len=2**31 - 1,
                vocab_size=0,
                kv_tokens=options.kv_tokens,
                block_tokens=1,
                kv_bytes_per_token=options.kv_bytes_per_token,
                express=options.express,
                resumes=True,
                transfer=options.transfer,
                transfer_agent=self.name,
            )
        )
        self.report()

    def fail(self, reason: str) -> None:
        """End a life: everything that the instance held is lost, and its router is told."""
        self.alive = False
        self.life += 1
        self.totals.failures += 1
        self._send_made()
        self._flush()
        self.drop_all()
        self.totals.count(self.engine)
        self.engine = self._options.make_instance(self)
        self._scheduled = inf
        self._cache.clear()
        self.link.cut(reason, LossCause.ENDED)

    def drop_all(self) -> None:
        """Forget all requests, and what was to be said of them."""
        self.engine.withdraw()
        self._served.clear()
        self._reserved.clear()
        self._outbox.clear()

    def peer_failed(self, name: str) -> None:
        """Compute here what was being read from an instance that has failed."""
        prefix = f"{name}/".encode()
        for id, reserved in list(self._reserved.items()):
            if reserved.begun and reserved.address.startswith(prefix):
                self._prefill_reserved(id, 0)

    # Reports

    def report_regularly(self, _: object = None) -> None:
        """Report, now and from now on."""
        period = self._options.report_seconds
        if period:
            if self.alive:
                self.report()
            self._timeline.at(self._timeline.now + period, self.report_regularly)

    def report(self) -> None:
        """Tell the router the state of this moment."""
        now = self._timeline.now
        state = self.engine.policy.state(now)
        options = self._options
        short, long = state.short_seconds, state.seconds - state.short_seconds
        for reserved in self._reserved.values():
            if reserved.begun and not reserved.tokens:  # a prefill that waits for lent KV
                long += options.profile.per_token * len(reserved.request.prompt)
        held = sum(served.job.computed for served in self._served.values())
        self.link.report(
            InstanceReport(
                role=self.role,
                ready=self.ends_at is None,
                draining=self._draining,
                ends_in=None if self.ends_at is None else max(0.0, self.ends_at - now),
                requests=len(self._served) + len(self._reserved),
                load=EngineLoad(
                    short_waiting=state.short_requests,
                    long_waiting=state.long_requests,
                    running=state.decoding_requests,
                    waiting_tokens=state.short_tokens + state.long_tokens,
                    queued_short_seconds=short,
                    queued_long_seconds=max(0.0, long),
                    kv_usage=min(1.0, held / options.kv_memory_tokens),
                    boundary_tokens=options.boundary_tokens,
                    cost=options.profile,
                ),
            )
        )

    def change_role(self, role: Role) -> None:
        """Serve as ``role`` from now on, also after a failure."""
        self.role = role
        if self.alive:
            self.report()

    def change_draining(self, on: bool) -> None:
        """Report that nothing new is wanted, or that it is wanted again."""
        self._draining = on
        if self.alive:
            self.report()

    # Messages

    def receive(self, message: Inbound) -> None:
        """Obey a message of the router.

        Answers leave before time goes on, but for `Accepted` if not every token is sent: it leaves
        with the first token, since routers decide nothing by it.
        """
        if isinstance(message, wire.AddRequest):
            self._add(message)
        elif isinstance(message, wire.AbortRequest):
            self._abort(message.id)
        elif isinstance(message, wire.Reserve):
            self._reserve(message)
        elif isinstance(message, wire.Begin):
            self._begin(message)
        elif isinstance(message, wire.Lend):
            self._lend(message)
        if self._outbox and (self._options.every_token or not isinstance(message, wire.AddRequest)):
            self._timeline.at(self._timeline.now, self._flush)
        self._schedule()

    def not_begun(self) -> list[str]:
        """Names of the requests that wait for their prefill."""
        return [job.id for job in self.engine.not_begun()]

    def _add(self, request: wire.AddRequest) -> None:
        tokens = len(request.prompt)
        history = min(self._cache.match(request.id, tokens), tokens - 1)
        refusal = self._submit(request, history)
        if refusal is None:
            self._say(wire.Accepted(request.id, history))
            return
        seconds = refusal.retry_after_seconds
        self._say(wire.Rejected(id=request.id, reason=refusal.reason, retry_after=seconds))

    def _submit(
        self, request: wire.AddRequest, history: int, fetched: int = 0, *, taken: bool = False
    ) -> Refuse | None:
        """Queue a request for its prefill, or refuse it unless it was taken before."""
        taken = taken or request.generated > 0
        promised = request.service is ServiceLevel.PROMISED
        left = request.sampling.max_tokens - request.generated
        alone = request.hand_over is not None or self._options.whole_answers
        job = SimulatedRequest(
            request.id,
            request.arrival,
            len(request.prompt) - history,
            history,
            1 if alone else left,
            request.deadline,
            request.priority,
            tpot=request.tpot if request.hand_over is None else None,
            service=ServiceLevel.USUAL if taken and promised else request.service,
        )
        refusal = self.engine.submit(job, self._timeline.now)
        if refusal is not None:
            return refusal
        tokens = self._options.make_tokens(request.id, request.prompt, request.generated)
        self._served[request.id] = _Served(request, job, tokens, left)
        self._admitted(request.id, job.new_tokens, history, fetched)
        return None

    def _abort(self, id: str) -> None:
        self._served.pop(id, None)
        self._reserved.pop(id, None)
        self.engine.abort(id, self._timeline.now)

    # KV transfer

    def _lend(self, message: wire.Lend) -> None:
        cached = self._cache.match(message.id, len(message.tokens))
        cached = min(max(cached, self._decoding(message.tokens)), len(message.tokens) - 1)
        self._say(
            wire.Offer(
                id=message.id, source=self._address(cached) if cached else b"", tokens=cached
            )
        )

    def _decoding(self, tokens: list[int]) -> int:
        """Return the length of ``tokens`` if a request that decodes here has their KV, else 0."""
        held = (served.request.prompt for served in self._served.values() if served.sent)
        return len(tokens) if any(prompt == tokens[: len(prompt)] for prompt in held) else 0

    def _reserve(self, message: wire.Reserve) -> None:
        request = message.request
        address = verify(message.source, SECRET, self.name)
        self._reserved[request.id] = _Reserved(request, address, self._timeline.now)
        self._say(wire.Accepted(request.id, 0))

    def _begin(self, message: wire.Begin) -> None:
        reserved = self._reserved.get(message.id)
        if reserved is None or reserved.begun:
            self._say(wire.Rejected(id=message.id, reason="not reserved", retry_after=None))
            return
        reserved.begun, reserved.tokens = True, message.tokens
        name, life, offered = reserved.address.decode().split("/")
        peer = self._peers[name]
        if not peer.alive or peer.life != int(life):
            self._prefill_reserved(message.id, 0)
            return
        # A prefill is read when it is complete, lent KV from the reservation on.
        since = self._timeline.now if message.tokens else reserved.since
        ready = since + self._options.transfer_seconds(int(offered))
        self._timeline.at(ready, self._read, (message.id, self.life, int(offered)))

    def _read(self, what: tuple[str, int, int]) -> None:
        """Note that all KV that was offered has arrived."""
        id, life, offered = what
        reserved = self._reserved.get(id)
        if reserved is None or life != self.life:
            return
        if not reserved.tokens:
            self._prefill_reserved(id, offered)
        else:
            self._decode_reserved(id)
        self._schedule()

    def _prefill_reserved(self, id: str, offered: int) -> None:
        """Prefill a request that was begun, on top of what was read or is cached here."""
        reserved = self._reserved.pop(id)
        request = reserved.request
        if reserved.tokens:
            prompt = [*request.prompt, *reserved.tokens]
            generated = request.generated + len(reserved.tokens)
            request = _with_output(request, prompt, generated)
        most = len(request.prompt) - 1
        history = min(max(self._cache.match(id, len(request.prompt)), offered), most)
        self._submit(request, history, min(offered, history), taken=True)
        self._schedule()

    def _decode_reserved(self, id: str) -> None:
        """Decode a request whose prompt was prefilled elsewhere and whose KV has arrived."""
        reserved = self._reserved.pop(id)
        request, made = reserved.request, len(reserved.tokens)
        left = request.sampling.max_tokens - request.generated - made
        job = SimulatedRequest(
            id,
            request.arrival,
            len(request.prompt),
            0,
            made + left,
            produced=made,
            tpot=request.tpot,
        )
        so_far = [*request.prompt, *reserved.tokens]
        tokens = self._options.make_tokens(id, so_far, request.generated + made)
        self._served[id] = _Served(request, job, tokens, left, made)
        self.engine.adopt(job, self._timeline.now)

    def _address(self, tokens: int) -> bytes:
        """Signed text that says where others read so many tokens of KV."""
        return sign(SECRET, f"{self.name}/{self.life}/{tokens}".encode())

    # Engine

    def started(self, job: SimulatedRequest, now: float) -> None:
        request = self._served[job.id].request
        if request.hand_over is not None:
            tokens = len(request.prompt)
            self._say(wire.Offer(id=job.id, source=self._address(tokens), tokens=tokens))

    def prefilled(self, job: SimulatedRequest, now: float) -> None:
        self._options.token_made(job.id, now)
        self._cache.prefilled(job.id)
        if job.produced < job.output_tokens:
            self._say_tokens(self._served[job.id], 1, None, job.history)

    def decoded(self, job: SimulatedRequest, now: float) -> None:
        self._options.token_made(job.id, now)
        if self._options.every_token:
            self._say_tokens(self._served[job.id], 1, None)

    def finished(self, job: SimulatedRequest, now: float) -> None:
        served = self._served.pop(job.id)
        options = self._options
        if job.produced > 1:  # `prefilled` has counted an answer's only token
            options.token_made(job.id, now)
        reason: wire.FinishReason = "length"
        count = job.produced - served.sent
        if options.whole_answers:
            count = served.left
        elif served.request.hand_over is not None and served.left > 1:
            reason = "handed_over"
        if reason == "length" and self.role != "decode":
            self._cache.finished(job.id)
        cached = job.history if served.sent == 0 else None
        self._say_tokens(served, count, reason, cached)

    def _say_tokens(
        self,
        served: _Served,
        count: int,
        reason: wire.FinishReason | None,
        cached: int | None = None,
    ) -> None:
        served.sent += count
        self._outbox.append(
            wire.Output(
                id=served.request.id,
                tokens=list(islice(served.tokens, count)),
                finish_reason=reason,
                cached_tokens=cached,
            )
        )

    def _send_made(self) -> None:
        """Send all tokens that were made and not sent yet."""
        for served in self._served.values():
            count = served.job.produced - served.sent
            if count > 0:
                self._say_tokens(served, count, None)

    # Events

    def _say(self, message: RequestAnswer) -> None:
        self._outbox.append(message)

    def _flush(self, _: object = None) -> None:
        messages, self._outbox = self._outbox, []
        self.link.deliver(messages)

    def _schedule(self) -> None:
        wake = self.engine.wake_at
        if wake < self._scheduled:
            self._scheduled = wake
            self._timeline.at(wake, self._wake, wake)

    def _wake(self, due: float) -> None:
        if due != self._scheduled:
            return  # an earlier event took its place
        engine = self.engine
        if engine.wake_at <= due:
            engine.advance(due)
        wake = self._scheduled = engine.wake_at
        self._timeline.at(wake, self._wake, wake)
        if self._outbox:
            self._flush()


def _with_output(request: wire.AddRequest, prompt: list[int], generated: int) -> wire.AddRequest:
    """Return the request as it is after so many tokens of its answer."""
    return structs.replace(request, prompt=prompt, generated=generated, hand_over=None)
