"""Everything that simulated instances of one fleet have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pla_serve.policy.cost import CostProfile
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.link import VirtualLink
from pla_serve.simulator.request import SimulatedRequest


class ServerCache(Protocol):
    """Prefix cache of one instance. Requests are told apart by the names that routers give them."""

    def match(self, id: str, tokens: int) -> int:
        """Leading tokens that are cached of a prompt of so many tokens."""

    def prefilled(self, id: str) -> None:
        """Keep the prompt of a request."""

    def finished(self, id: str) -> None:
        """Keep the prompt and the answer of a request."""

    def clear(self) -> None:
        """Hold nothing."""


MakeTokens = Callable[[str, Sequence[int], int], Iterator[int]]
"""Yields the tokens that follow: name of the request, tokens so far, how many of them are output.
"""


class ServedEvents(Protocol):
    """Callbacks of a `SimulatedInstance`; see there."""

    def started(self, job: SimulatedRequest, now: float) -> None: ...
    def prefilled(self, job: SimulatedRequest, now: float) -> None: ...
    def decoded(self, job: SimulatedRequest, now: float) -> None: ...
    def finished(self, job: SimulatedRequest, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Everything that simulated instances of one fleet have in common."""

    make_instance: Callable[[ServedEvents], SimulatedInstance]
    make_tokens: MakeTokens
    profile: CostProfile
    """Reported to routers, as the instance's own cost model."""
    boundary_tokens: int
    express: bool
    """Shorts do not wait for longs."""
    kv_tokens: int
    """Tokens that a prefix cache keeps, reported to routers."""
    kv_memory_tokens: int
    """Tokens whose KV fits on the machine."""
    kv_bytes_per_token: int = 0
    transfer: str | None = None
    """As `InstanceFacts.transfer`."""
    transfer_seconds: Callable[[int], float] = lambda tokens: 0.0
    """Time to read the KV of so many tokens from another instance."""
    report_seconds: float = 0.2
    """Time between two reports; 0: only changes are reported."""
    token_made: Callable[[str, float], None] = lambda id, now: None
    """Called with the name of a request and the time of each of its tokens."""
    every_token: bool = False
    """Each token is sent when it is made. Otherwise the first is, and the others with the last one
    or before a failure: routers decide nothing by them."""
    make_link: Callable[..., VirtualLink] = VirtualLink
    """Makes the link to the router, with the arguments of `VirtualLink`."""
    whole_answers: bool = False
    """An answer ends with its first token, which brings all others along."""
