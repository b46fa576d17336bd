"""A request on its way through the fleet, from its arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec

from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.hand_over import HandOverState
from pla_serve.fleet.router.prefixes import Chain, PrefixMark
from pla_serve.server.engine.session import AnswerReceiver
from pla_serve.wire import engine as wire

MOST_ROUNDS = 8
"""Most failures of one request with tokens in between, as a multiple of those without."""


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Prevent the call; a call that was made is not affected."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One request on one instance, from the moment it is sent until it ends there."""

    instance: FleetInstance
    id: str
    """Name of the request on that instance. Each attempt has a name of its own, so that late
    messages of an earlier attempt are not taken for messages of this one."""
    sent: float
    epoch: int
    """Number of the instance's connection on which the request was sent."""
    mark: PrefixMark | None
    """Entry in the record of prefixes, until the first token confirms it."""
    blocks: int
    """Blocks in that entry."""
    believed: int
    """Prompt tokens that were believed to be cached there."""
    expected: float
    """Predicted seconds to the first token."""
    alone: tuple[int, int] | None
    """New tokens and history, if nothing else waited on the instance when the request was sent."""
    fetched: int = 0
    """Tokens whose KV comes from another instance."""
    first: bool = False
    """The first token of this attempt has come."""


class Blame(NamedTuple):
    """Record that an instance failed a request."""

    boot: str
    epoch: int
    """Number of the connection on which it failed."""
    at: float


@dataclass(slots=True, eq=False)
class Loss:
    """The loss of an instance."""

    name: str
    """The instance."""
    boot: str
    """Name of the engine's life."""
    at: float
    requests: list[RoutedRequest]
    """Requests that had got no token there."""
    ended: bool
    """The engine is known to have ended; otherwise it may still be there."""


@dataclass(slots=True, eq=False)
class OngoingHandOver:
    """A hand-over in progress: its state, and who takes part in it."""

    state: HandOverState
    source: FleetInstance
    source_id: str
    """Name of the request on the source."""
    source_epoch: int
    """Number of the source's connection; its KV ends with the connection."""
    target: Attempt | None = None
    """Charged to the target, from the moment it is chosen."""
    carried: int = 0
    """Output tokens that `Reserve` told the target of."""
    tried: set[str] = field(default_factory=set)
    """Instances that were asked to be the target."""


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """Everything that is needed to continue a request on another instance."""

    original: wire.AddRequest
    """The request as the API made it, with a seed."""
    receiver: AnswerReceiver
    tenant: str
    chain: Chain
    """Block hashes of the prompt, and of the output as far as ``chained``."""
    chained: int = 0
    """Output tokens in ``chain``."""
    tokens: list[int] = field(default_factory=list)
    """Output that the client has got."""
    attempt: Attempt | None = None
    """The attempt that tokens come from; None while the request is parked, or between the two
    instances of a hand-over."""
    accepted: bool = False
    """The client has been told that the request was accepted."""
    attempts: int = 0
    """Number of attempts so far."""
    failures: list[str] = field(default_factory=list)
    """Reasons for which attempts failed, with the names of instances: for the log only."""
    fruitless: int = 0
    """Failures since the last token."""
    losses: list[Loss] = field(default_factory=list)
    """Losses of instances before they made a token of it, since its last token, but for those whose
    engines are known to be still there."""
    together: bool = False
    """A hand-over came to nothing: prefill and decode stay on one instance from now on."""
    hand_over: OngoingHandOver | None = None
    avoid: dict[str, Blame] = field(default_factory=dict)
    """Instances that failed the request, by name."""
    refused: dict[str, float] = field(default_factory=dict)
    """Instances that had no room, by name, and the seconds after which they may have."""
    stalled: float | None = None
    """Time at which the request was first left without an instance or without progress; None while
    it makes progress."""
    timer: Timer | None = None
    """Next placement of a parked request."""

    @property
    def known_tokens(self) -> int:
        """Number of tokens of the prompt and of the output so far."""
        return len(self.original.prompt) + len(self.tokens)

    @property
    def scoring(self) -> bool:
        """Whether log probabilities or an embedding of the prompt are to come.

        An instance then computes all of the prompt, and no other one takes part.
        """
        return not self.tokens and self.original.reads_prompt

    @property
    def lost_engines(self) -> int:
        """Engines that have ended, or may have, before they made a token of this request."""
        return len(self.losses)

    def failed_too_often(self, most: int) -> bool:
        """Return whether it may fail no more: ``most`` times without a token in between."""
        return self.fruitless >= most or len(self.failures) >= MOST_ROUNDS * most

    @property
    def id(self) -> str:
        """Name of the request towards the client."""
        return self.original.id

    def answer(self, output: wire.Output) -> wire.Output:
        """Return an instance's output as the client gets it."""
        changed: dict[str, str | None] = {}
        if output.id != self.id:
            changed["id"] = self.id
        if self.tokens and output.cached_tokens is not None:
            changed["cached_tokens"] = None  # clients are told what the first attempt found
        return msgspec.structs.replace(output, **changed) if changed else output

    def message(self, id: str, hand_over: wire.HandOver | None = None) -> wire.AddRequest:
        """The message to an instance: the prompt and all output so far, under the name ``id``."""
        original = self.original
        if id == original.id and not self.tokens and hand_over is None:
            return original
        return msgspec.structs.replace(
            original,
            id=id,
            prompt=[*original.prompt, *self.tokens] if self.tokens else original.prompt,
            generated=original.generated + len(self.tokens),
            hand_over=hand_over,
        )

    def extend_chain(self) -> None:
        """Bring the chain up to the last token."""
        if self.chained < len(self.tokens):
            self.chain.extend(self.tokens[self.chained :])
            self.chained = len(self.tokens)

    def next_id(self) -> str:
        """A fresh name for the next attempt."""
        self.attempts += 1
        id = self.original.id
        return id if self.attempts == 1 else f"{id}~{self.attempts}"


def with_seed(request: wire.AddRequest) -> wire.AddRequest:
    """Return the request with a seed for sampling, if it samples and the client gave none.

    An instance would draw a seed of its own, and the next instance another one, so that a stream
    could not be continued. The seed is derived from the id, which is random.
    """
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature == 0:
        return request
    digest = blake2b(request.id.encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, seed=seed))
