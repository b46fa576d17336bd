"""The one contract between a policy and whatever executes it.

Life of a request, as the policy sees it::

    add(PrefillRequest)                  it waits
      -> Run(batch) or an express batch  some of its new tokens are in flight
      -> observe(batch, seconds)         they were computed; what is left waits again
         or, from an executor that decides on the next batch while the device computes this one,
         dispatched(batch)               their end is certain; what is left waits again
         next() -> Run(next batch)       is asked for and enqueued meanwhile
         measured(batch, seconds)        the end has come
    start_decode(id)                     its prefill is complete and it wants more tokens
      -> one Chunk of a batch's ``decodes`` for every further token
    remove(id)                           finished, aborted, or parked by the executor

All times are seconds on the caller's clock; the policy owns no clock and draws no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol


class BatchClass(StrEnum):
    """Class of a batch. ``MIXED`` exists for baselines that do not separate classes."""

    SHORT = "short"
    LONG = "long"
    DECODE = "decode"
    MIXED = "mixed"
    OFFLINE = "offline"
    """All in it are of `ServiceLevel.OFFLINE`: prefills of any size, and decode steps."""


class ServiceLevel(StrEnum):
    """How a request is admitted and ordered, by what was promised to it."""

    USUAL = "usual"
    """Nothing was promised. Its deadline, if it has one, is a wish."""
    PROMISED = "promised"
    """It is refused if its targets are predicted not to be kept."""
    BULK = "bulk"
    """Nobody waits for it. It counts as long whatever its size, and steps behind all others for
    `longs.BULK_PATIENCE`."""
    OFFLINE = "offline"
    """Nobody waits for it, and it takes only time that others leave: see `harvest.Harvesting`. To
    a policy by itself it is bulk work."""

    @property
    def unhurried(self) -> bool:
        """Whether nobody waits for such a request, so that it never counts as short."""
        return self in (ServiceLevel.BULK, ServiceLevel.OFFLINE)


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """A prompt, or the rest of one, as numbers.

    ``new_tokens`` (L, at least 1) are still to be computed; ``history`` (H) tokens before them have
    their KV cached. Both shrink and grow with the cache, so a request may be added again with other
    numbers: the newest add counts, and ``arrival`` keeps its place.
    """

    id: str
    arrival: float
    new_tokens: int
    history: int = 0
    deadline: float | None = None
    """Absolute time by which the first token is due, or None."""
    priority: int = 0
    """Smaller is sooner; ties are for the policy."""
    tenant: str = ""
    """Owner of the request, for shares: requests with the same text belong to one."""
    service: ServiceLevel = ServiceLevel.USUAL
    tpot: float | None = None
    """It wants a token after each so many seconds. With None the policy's own target counts, or its
    further tokens are made elsewhere."""


class Chunk(NamedTuple):
    """``tokens`` consecutive tokens of one request on top of ``history`` cached ones.

    In ``Batch.decodes`` ``tokens`` is 1 and the chunk yields one token. In ``Batch.prefills`` it
    yields a token only if ``completes`` says that the prompt ends with it. (A tuple, because a
    decision may make a hundred of these and has microseconds for it.)
    """

    request_id: str
    tokens: int
    history: int
    completes: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of one forward pass.

    Example: ``Batch(BatchClass.SHORT, (Chunk("a", 64, 0),), (Chunk("b", 1, 900),))`` completes the
    prompt of a and makes one more token of b.
    """

    kind: BatchClass
    prefills: tuple[Chunk, ...] = ()
    decodes: tuple[Chunk, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that pass through the linear layers."""
        return sum(chunk.tokens for chunk in self.prefills) + len(self.decodes)


@dataclass(frozen=True, slots=True)
class Run:
    """Compute this batch now."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Wait:
    """Run nothing now, although work waits: ask again at ``until``, or when something changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Run nothing: no work is queued."""


Decision = Run | Wait | Idle


@dataclass(frozen=True, slots=True)
class QueueState:
    """Waiting work, for metrics and admission. Token counts are new tokens left."""

    short_requests: int
    long_requests: int
    decoding_requests: int
    short_tokens: int
    long_tokens: int
    seconds: float
    """Predicted time to prefill everything that waits."""
    short_seconds: float
    """Part of ``seconds`` that short prefills take."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Abilities of a policy that those around it have to know; fixed once the policy is made.

    An engine sends them to routers when it is ready, and the simulator asks for them.
    """

    leaves_at_layer_boundary: bool = False
    """A running prefill may be left at a layer boundary for a more urgent one. So a short request
    hardly waits for the long ones on the same instance, and routers predict its wait without them.
    If False, `PrefillPolicy.at_layer_boundary` returns None for all batches but offline ones."""


class TenantLoad(NamedTuple):
    """Unfinished prefills of one tenant, and how many tenants share the device with it."""

    tenants: int
    """Tenants with unfinished prefills, this one included."""
    tokens: int
    """New tokens left of this tenant."""
    seconds: float
    """Predicted time to prefill them."""


class PrefillPolicy(Protocol):
    """Decides what runs next. Deterministic in its calls; never reads a clock.

    Chunks that a returned batch names are in flight until ``observe``, ``dispatched`` or ``remove``
    mentions them; a request in flight is never handed out again. Methods are called from one
    thread.
    """

    @property
    def capabilities(self) -> Capabilities:
        """Abilities of this policy, beyond what every policy can do."""
        ...

    def add(self, request: PrefillRequest, now: float) -> None:
        """Queue a request, or replace the numbers of one that is queued and not in flight."""
        ...

    def start_decode(
        self,
        request_id: str,
        context: int,
        arrival: float,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        """Decode a request whose prefill is complete; ``context`` of its tokens are cached.

        Args:
            now: when it got its first token, or the last one elsewhere.
            tpot: its target for the seconds from one token to the next; None: the policy's own.
        """
        ...

    def remove(self, request_id: str) -> None:
        """Forget a request, whether it waits, runs or decodes; unknown ids are ignored."""
        ...

    def next(self, now: float) -> Decision:
        """Called when the device is free, or busy with a batch that was `dispatched`."""
        ...

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        """Called between two layers of ``running``: a batch to compute first, or None to go on.

        It is then the running one, and is asked about at its own boundaries.
        """
        ...

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        """``batch`` was computed and took ``seconds``, express batches inside it not counted.

        It may be a part of the batch that was handed out; the rest was taken back by ``remove``. If
        all of it was, ``batch`` has no chunks, and ``seconds`` are what it took until it was left.
        """
        ...

    def dispatched(self, batch: Batch, now: float) -> None:
        """All of ``batch`` is on its way and nothing will stop it: the part of `observe` that is
        known before it has run, so no time is booked here. It was handed out by `next`, and nothing
        inside it is in flight.

        What is left of its requests may be handed out by `next`. One batch at most is begun before
        `measured` tells of this one, and `at_layer_boundary` is not called in between.
        """
        ...

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        """The batch that was `dispatched` took ``seconds``: the other part of `observe`."""
        ...

    def predicted_wait(
        self,
        new_tokens: int,
        history: int,
        now: float,
        deadline: float | None = None,
        *,
        bulk: bool = False,
    ) -> float:
        """Seconds until the first token of such a request, were it to arrive now."""
        ...

    def token_seconds(self, context: int, tpot: float, now: float) -> float:
        """Seconds from token to token of such a stream, were it to decode now.

        Args:
            context: its cached tokens.
            tpot: its target in seconds.
        """
        ...

    def state(self, now: float) -> QueueState:
        """Return the waiting work, for metrics and admission."""
        ...

    def load_of(self, tenant: str) -> TenantLoad:
        """Return the unfinished prefills of one tenant, for admission."""
        ...

    def waits_as_short(self, new_tokens: int, history: int) -> bool:
        """The class that this policy's boundary gives to such a request; for metrics by class."""
        ...
