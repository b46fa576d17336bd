"""A request under way through the fleet, from its arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec

from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.prefixes import Chain, PrefixMark
from pla_serve.server.engine.session import NewsReceiver
from pla_serve.wire.engine import AddRequest, HandOver


class Timer(Protocol):
    """A call that will come."""

    def cancel(self) -> None: ...


@dataclass(slots=True, eq=False)
class Leg:
    """A request's stay on one instance."""

    instance: FleetInstance
    id: str
    """What it is called there: news of earlier stays must not be taken for news of this one."""
    sent: float
    epoch: int
    """Of the connection that it was sent on."""
    mark: PrefixMark | None
    """In the record of prefixes, until its first token."""
    believed: int
    """Prompt tokens that were believed to be cached."""
    expected: float
    """Predicted seconds to its first token."""
    alone: tuple[int, int] | None
    """New tokens and history, if nothing else waited there when it was sent."""
    fetched: int = 0
    """Tokens whose KV comes from another instance."""
    first: bool = False
    """Its first token has come from there."""


class Blame(NamedTuple):
    """Of an instance that failed a request."""

    boot: str
    epoch: int
    """The connection."""
    at: float


@dataclass(slots=True, eq=False)
class Hand:
    """KV of a request on its way from ``source`` to ``target``."""

    source: FleetInstance
    source_id: str
    source_epoch: int
    lent: bool
    """The source only has the KV in its cache; otherwise it prefills the request."""
    offer: bytes | None = None
    """What the target reads by; None before `Offer`."""
    done: bool = False
    """The source's part is over: it handed over, or it lent or was lost."""
    target: Leg | None = None
    """On the account of the target from `Reserve` on."""
    reserved: bool = False
    """The target has accepted."""
    begun: bool = False
    carried: int = 0
    """Output tokens that the target knows of from `Reserve`."""
    tried: set[str] = field(default_factory=set)
    """Targets that refused or failed."""


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """Everything that is needed to go on elsewhere."""

    request: AddRequest
    """As the API made it, with a seed."""
    receiver: NewsReceiver
    tenant: str
    chain: Chain
    """Of the prompt, and of the output as of `extend_chain`."""
    chained: int = 0
    """Output tokens in it."""
    tokens: list[int] = field(default_factory=list)
    """Output that the client has got."""
    leg: Leg | None = None
    told: bool = False
    """The client side knows that it was accepted."""
    attempts: int = 0
    """How often it was sent."""
    failures: list[str] = field(default_factory=list)
    """Why instances did not finish it."""
    fruitless: int = 0
    """Failures since its last token."""
    whole: bool = False
    """A hand-over came to nothing: prefill and decode stay together from now on."""
    hand: Hand | None = None
    """While its KV goes from one instance to another."""
    avoid: dict[str, Blame] = field(default_factory=dict)
    """Instances that failed it."""
    refused: dict[str, float] = field(default_factory=dict)
    """Instances that had no room just now, and when they said to come again."""
    stalled: float | None = None
    """Since when it is on no instance, or waits there again for a first token."""
    timer: Timer | None = None
    """While it is parked."""

    def message(self, id: str, hand_over: HandOver | None = None) -> AddRequest:
        """What is sent to an instance: the prompt and all output so far."""
        request = self.request
        if id == request.id and not self.tokens and hand_over is None:
            return request
        return msgspec.structs.replace(
            request,
            id=id,
            prompt=request.prompt + self.tokens,
            generated=request.generated + len(self.tokens),
            hand_over=hand_over,
        )

    def extend_chain(self) -> None:
        """Bring the chain up to the last token."""
        if self.chained < len(self.tokens):
            self.chain.extend(self.tokens[self.chained :])
            self.chained = len(self.tokens)

    def next_id(self) -> str:
        """A fresh name for the next stay."""
        self.attempts += 1
        id = self.request.id
        return id if self.attempts == 1 else f"{id}~{self.attempts}"


def with_seed(request: AddRequest) -> AddRequest:
    """The same request, sampled from a seed of its own if the client gave none.

    An instance would draw one, and another instance another one: a stream could not be continued.
    The seed follows from the id, which is random.
    """
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature == 0:
        return request
    digest = blake2b(request.id.encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(sampling, seed=seed))
