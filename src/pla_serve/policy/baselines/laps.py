"""Short first, a fixed window, large chunks: the published artifact of PLA-Serve (LAPS)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pla_serve.policy.baselines.fcfs import ArrivalQueue
from pla_serve.policy.baselines.two_queues import OneAtATime, TwoQueues
from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import PolicyKind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Wait
from pla_serve.policy.queues import PrefillSource


@dataclass(frozen=True, slots=True)
class LapsOptions:
    """Knobs of `Laps`.

    Raises:
        ValueError: a field is out of range.
    """

    window_seconds: Annotated[
        float,
        Knob(
            "How long a short prompt waits for others, from its arrival on. 0 never waits.",
            unit="seconds",
            least=0,
        ),
    ] = 0.007
    depth: Annotated[int, Knob("Shorts that end the window early.", unit="requests", least=1)] = 64
    chunk_tokens: Annotated[
        int,
        Knob(
            "Most tokens in a batch: of a long prompt's chunk, and of shorts together.",
            unit="tokens",
            least=1,
        ),
    ] = 8192
    classify: Annotated[
        Literal["raw", "uncached"],
        Knob("raw counts the whole prompt, cached tokens and all; uncached the new tokens."),
    ] = "raw"

    def __post_init__(self) -> None:
        check_knobs(self)


class RawLengthBook(RequestBook):
    """Request book that counts a prefill as short if its whole prompt, L + H, is at most L_m.

    So the class of a request does not depend on how much of its prompt is cached.
    """

    def is_short(self, new_tokens: int, history: int) -> bool:
        return new_tokens + history <= self.boundary(0)


class Laps(TwoQueues):
    """The published artifact of arXiv 2601.11589: two queues, the short one always first.

    A prompt is short by its raw length, as published. Shorts are gathered until the first of them
    has waited for ``window_seconds``, ``depth`` of them are there, or a batch is full; meanwhile
    the device rests, longs or not. Longs run when no short waits, one at a time in order of
    arrival, in chunks of ``chunk_tokens`` that nothing interrupts. So the classes never share a
    batch, and shorts that keep coming starve the longs: nothing bounds that wait.

    The artifact has its decode on other instances. Here steps ride along in every batch, and run
    while shorts are gathered. The adaptive window and depth of the paper are in `published.policy`.

    Uses of `PolicyConfig`: ``max_batch_requests`` and ``boundary_tokens``. ``chunk_tokens`` takes
    the place of ``max_batch_tokens`` and ``long_chunk_tokens``; deadlines are not used.
    """

    def __init__(
        self, config: PolicyConfig, cost: CostModel, options: LapsOptions | None = None
    ) -> None:
        options = options or LapsOptions()
        config = replace(config, max_batch_tokens=options.chunk_tokens, long_chunk_tokens=None)
        make_book = RawLengthBook if options.classify == "raw" else RequestBook
        self._window = options.window_seconds
        self._depth = min(options.depth, config.max_batch_requests)
        self._gathered, longs = ArrivalQueue(), OneAtATime()
        book = make_book(config, cost, self._gathered, longs, one_account=True)
        super().__init__(config, cost, self._gathered, book, longs)

    def _round(self, now: float) -> PrefillSource | Wait | None:
        head = self._gathered.first()
        if head is None:
            return None
        until = self._window_ends(head)
        return Wait(until) if now < until else self._gathered

    def _gathers(self, newcomer: Pending, now: float) -> float:
        return self._window_ends(self._gathered.first() or newcomer) - now

    def _window_ends(self, head: Pending) -> float:
        full = (
            len(self._gathered) >= self._depth
            or self._book.short_backlog.tokens >= self._book.config.max_batch_tokens
        )
        return head.arrival + (0.0 if full or head.started else self._window)


POLICY = PolicyKind(
    name="laps",
    summary="short first after a fixed window, the published artifact of PLA-Serve",
    make=Laps,
    options=LapsOptions,
    settings=("max_batch_requests", "boundary_tokens"),
)
