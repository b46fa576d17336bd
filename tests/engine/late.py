"""An engine on a device that works late: nothing is computed before the host waits for it.

Batches that run as a whole are put off, with the choice of their tokens, until a mark behind them
is waited for (or a later pass has to run, which comes behind them in the one stream). So what the
host believes before that shows: logits are NaN, tokens wrong. Passes with layer boundaries compute
as the host goes through them; their marks are as late as those of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, Scratch
from pla_serve.engine.device.capture import NoCapture
from pla_serve.engine.device.run_ahead import RunAhead
from pla_serve.engine.kv.manager import BlockTable
from pla_serve.engine.run.executor import BatchExecutor, Executed
from pla_serve.engine.run.graphs.grid import GridLimits, ShapeGrid
from pla_serve.engine.run.runner import AtBoundary, ModelRunner
from pla_serve.engine.sampling import Sampled, Sampler, SequenceSampling, TokenChoice
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.shapes.ladder import Shape
from tests.engine.fake_device import FakeDevice, HostClock
from tests.engine.tiny import (
    BLOCK,
    MAX_BLOCKS,
    VOCABULARY,
    Engine,
    grammar_compiler,
    make_engine,
    new_runner,
)

MOST_TOKENS, MOST_REQUESTS = 32, 8
"""Of a batch that runs as a whole."""
WRONG = 17
"""What stands where a token has not been chosen yet."""


@dataclass
class LateDevice(FakeDevice):
    """Keeps work that was put off, and who uses which blocks until when."""

    put_off: list[Callable[[], None]] = field(default_factory=list)
    gaps: int = 0
    """Batches that found nothing before them that the device had still to do."""
    uses: list[tuple[int, set[int]]] = field(default_factory=list)
    writes: list[tuple[int, set[int]]] = field(default_factory=list)

    def later(self, name: str, work: Callable[[], None]) -> None:
        self.enqueue(name)
        self.put_off.append(work)

    def catch_up(self) -> None:
        """Compute what was put off; the host does not hear of it."""
        while self.put_off:
            self.put_off.pop(0)()

    def finish(self, position: int) -> None:
        if position > self.finished:
            self.catch_up()
        super().finish(position)

    def takes(self, requests: Sequence[SpanRequest]) -> None:
        """A batch that ends here uses the blocks of these."""
        used, written = set(), set()
        for request in requests:
            blocks = [b for first, end in request.runs for b in range(first, end)]
            used.update(blocks)
            end = request.history + len(request.tokens)
            written.update(blocks[request.history // BLOCK : -(-end // BLOCK)])
        self.uses.append((len(self.enqueued), used))
        self.writes.append((len(self.enqueued), written))

    def used(self) -> set[int]:
        """Blocks of batches that are not finished."""
        self.uses = [(end, blocks) for end, blocks in self.uses if end > self.finished]
        return set().union(*(blocks for _, blocks in self.uses))

    def written(self) -> set[int]:
        """Those of them that are written to."""
        self.writes = [(end, blocks) for end, blocks in self.writes if end > self.finished]
        return set().union(*(blocks for _, blocks in self.writes))


class LateExecutor:
    """Small batches as a whole, and late; others layer by layer."""

    carries = True

    def __init__(self, inner: BatchExecutor, device: LateDevice) -> None:
        self.device = device
        self._inner = inner
        self.batches: list[int] = []
        """Where in the stream each batch that ran as a whole is."""

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        device = self.device
        if not device.unfinished:
            device.gaps += 1
        tokens = sum(len(r.tokens) for r in requests)
        if tokens > MOST_TOKENS or len(requests) > MOST_REQUESTS:
            return self._layered(requests, at_boundary, carried)
        frozen = [replace(r, tokens=list(r.tokens), runs=list(r.runs)) for r in requests]
        logits = torch.full((sum(r.wants_logits for r in requests), VOCABULARY), torch.nan)

        def compute() -> None:
            logits.copy_(self._inner.forward(frozen, lambda: None, carried).logits)

        self.batches.append(len(device.enqueued))
        device.later("whole", compute)
        device.takes(frozen)
        return Executed(logits, True)

    def _layered(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None,
    ) -> Executed:
        device = self.device

        def boundary() -> None:
            at_boundary()
            device.catch_up()
            device.enqueue("layer")

        device.catch_up()  # carried tokens are read before the first layer
        try:
            executed = self._inner.forward(requests, boundary, carried)
        finally:
            device.takes(requests)
        assert not executed.whole
        return executed

    def end_warm_up(self) -> None:
        return None

    def use_idle_time(self) -> bool:
        return False

    def counts(self) -> None:
        return None


class LateSampler(Sampler):
    """Chooses when the device comes to it, by what the host knew when it asked."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__(VOCABULARY, torch.device("cpu"), grammar_compiler())
        self._late = device
        self._ends: dict[int, int] = {}

    def choose(self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]) -> TokenChoice:
        if any(sequence.params.logprobs is not None for sequence in sequences):
            self._late.finish(len(self._late.enqueued))  # as the real one, which reads them
            return super().choose(logits, sequences)
        seen = [copy(sequence) for sequence in sequences]
        tokens = torch.full((len(sequences),), WRONG)

        def compute() -> None:
            tokens.copy_(super(LateSampler, self).choose(logits, seen).chosen)

        self._late.later("choice", compute)
        self._ends[id(tokens)] = len(self._late.enqueued)
        return TokenChoice(sequences, tokens, tokens, {})

    def accept(self, choice: TokenChoice, last: Collection[int] = ()) -> list[Sampled]:
        end = self._ends.pop(id(choice.tokens), 0)
        assert end <= self._late.finished, "tokens were read before they were there"
        return super().accept(choice, last)


@cache
def late_runner() -> ModelRunner:
    return new_runner("llama", padded=True)


@dataclass
class LateEngine:
    engine: Engine
    device: LateDevice
    executor: LateExecutor


def late_engine(
    policy: PrefillPolicy,
    *,
    blocks: int = MAX_BLOCKS,
    short_reserve: int = 0,
    prefix_cache: bool = True,
    async_scheduling: bool = True,
    depth: int = 2,
) -> LateEngine:
    """No block is given to anybody while a batch that uses it is not finished."""
    device = LateDevice()
    runner = late_runner()
    clock = HostClock(least=1.0)
    runner._run_ahead = RunAhead(device, depth, clock=clock, sleep=clock.sleep)
    limits = GridLimits(BLOCK, Scratch(MAX_BLOCKS * BLOCK, BLOCK), 512, 64, 1.0)
    shapes = [Shape(4, 4), Shape(16, 4), Shape(MOST_TOKENS, MOST_REQUESTS)]
    cpu = torch.device("cpu")
    grid = ShapeGrid(runner, NoCapture(), DirectUploader(), shapes, lambda t, b: t, limits, cpu)
    grid.capture_all()
    whole = BatchExecutor(runner, grid, DirectUploader(), device, BLOCK)
    executor = LateExecutor(whole, device)
    engine = make_engine(
        "llama",
        policy,
        blocks=blocks,
        short_reserve=short_reserve,
        prefix_cache=prefix_cache,
        executor=executor,
        sampler=LateSampler(device),
        async_scheduling=async_scheduling,
    )
    kv = engine.parts.kv
    pool, remember = kv._pool, kv.remember

    def checked_remember(
        tokens: Sequence[int], computed: int, table: BlockTable, *, in_use: bool = False
    ) -> None:
        assert computed <= len(tokens), "a token is not known yet"
        fresh = table.blocks[table.inserted : computed // BLOCK]
        assert not device.written().intersection(fresh), "KV is cached that is not there yet"
        remember(tokens, computed, table, in_use=in_use)

    kv.remember = checked_remember  # type: ignore[method-assign]
    allocate = pool.allocate

    def checked(count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        found = allocate(count, after=after, room=room)
        assert not device.used().intersection(found), "a block is given away that is in use"
        return found

    release = pool.release

    def checked_release(blocks: Iterable[int]) -> None:
        for block in blocks:
            release((block,))
            if block in device.used():
                assert pool.holders(block), "a block comes free that is in use"

    pool.allocate = checked  # type: ignore[method-assign]
    pool.release = checked_release  # type: ignore[method-assign]
    return LateEngine(engine, device, executor)
