"""Engines on one wire and one clock, and the least of a router that passes messages on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from uuid import UUID

import torch

from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.engine.transfer.credentials import Credentials
from pla_serve.engine.transfer.exchange import PeerExchange, assemble
from pla_serve.engine.transfer.layout import Copy, KVLayout
from pla_serve.engine.transfer.reader import Reader
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.wire.engine import (
    AddRequest,
    HandOver,
    Lend,
    Offer,
    Outbound,
    Output,
    Rejected,
    Reserve,
    SamplingParams,
)
from pla_serve.wire.kv_offer import bind
from tests.engine import tiny
from tests.engine.chaos import ChaosPolicy
from tests.engine.transfer.wire import Wire, WireTransport

LEASE = 5.0
SECRET = b"the secret of all engines of a test"


@cache
def own_runner(name: str, number: int) -> ModelRunner:
    """One runner, with its own KV memory, for each number."""
    return tiny.new_runner(name)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        self.now += 0.0001
        return self.now


@dataclass
class Node:
    """An engine, its side of the exchange, and what a router has not yet read of its messages."""

    engine: tiny.Engine
    exchange: PeerExchange
    reader: Reader
    layout: KVLayout
    name: str
    busy: bool = False
    read: int = 0

    def step(self) -> float | None:
        """One step, unless it is in the middle of one already."""
        if self.busy:
            return 0.0
        self.busy = True
        try:
            return self.engine.loop.step()
        finally:
            self.busy = False

    def news(self) -> list[Outbound]:
        """Messages since it was asked last."""
        emitted = self.engine.emitted
        news, self.read = emitted[self.read :], len(emitted)
        return news

    def find(self, kind: type, request_id: str) -> list[Outbound]:
        found = [m for m in self.engine.emitted if isinstance(m, kind)]
        return [m for m in found if m.id == request_id]  # type: ignore[attr-defined]


@dataclass
class World:
    """Nodes of one model."""

    model: str = "llama"
    wire: Wire = field(default_factory=Wire)
    clock: Clock = field(default_factory=Clock)
    lives: int = 0

    def node(
        self, number: int, policy: PrefillPolicy, blocks: int = 256, secret: bytes = SECRET
    ) -> Node:
        """A fresh engine in the memory of this number; the one that was there must be dead."""
        runner = own_runner(self.model, number)
        kv = runner._cache
        for memory in (*kv.keys, *kv.values):
            memory.fill_(torch.nan)
        self.lives += 1
        life = UUID(int=(self.lives << 100) | number)
        made: list[tuple[PeerExchange, Reader, KVLayout]] = []

        def exchange(parts: EngineParts) -> PeerExchange:
            layout = KVLayout.of(kv, tiny.BLOCK, self.model)
            exchange, reader = assemble(
                layout,
                parts.kv,
                parts.gate,
                parts.intake,
                credentials=Credentials(secret, life, lambda: self.clock.now),
                transport=lambda name, _: WireTransport(self.wire, name),
                threaded=False,
            )
            made.append((exchange, reader, layout))
            return exchange

        engine = tiny.make_engine(
            self.model,
            policy,
            runner_of=runner,
            exchange=exchange,
            clock=self.clock,
            blocks=blocks,
        )
        return Node(engine, *made[0], name=f"pla-{life}")

    def alone(self, request_id: str, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Return the output of an engine that serves this request alone, not stopped by EOS."""
        engine = tiny.make_engine(self.model, ChaosPolicy(0))
        engine.add(request_id, prompt, max_tokens=tokens, ignore_eos=True)
        engine.run()
        return engine.tokens(request_id)

    def move(self, *nodes: Node, rounds: int = 400) -> None:
        """Everything goes on, and all reads arrive, until nothing changes any more."""
        for _ in range(rounds):
            self.wire.settle()
            for node in nodes:
                node.reader.step()
            self.wire.settle()
            pauses = [node.step() for node in nodes]
            resting = all(pause is None or pause >= 0.5 for pause in pauses)
            if resting and not any(node.engine.inbox for node in nodes):
                return
        raise AssertionError("it does not come to rest")


def request(
    request_id: str,
    prompt: Sequence[int],
    *,
    lease: float | None = None,
    priority: int = 0,
    cache_scope: str = "",
    **sampling: object,
) -> AddRequest:
    """Greedy unless told otherwise; to be handed over if there is a lease."""
    params = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return AddRequest(
        id=request_id,
        prompt=list(prompt),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        arrival=0.0,
        priority=priority,
        cache_scope=cache_scope,
        hand_over=None if lease is None else HandOver(lease_seconds=lease),
    )


def offer_of(node: Node, request_id: str) -> Offer:
    found = node.find(Offer, request_id)
    assert found, f"{request_id} was not offered: {node.engine.emitted}"
    offer = found[-1]
    assert isinstance(offer, Offer)
    return offer


def reserve(node: Node, add: AddRequest, source: bytes, lease: float = LEASE) -> None:
    """Reserve a request with an offer that is bound to this node, as a router does it."""
    if source:
        source = bind(source, node.name)
    node.engine.inbox.append(Reserve(request=add, source=source, lease_seconds=lease))


def lend(
    node: Node, request_id: str, tokens: Sequence[int], scope: str = "", lease: float = LEASE
) -> None:
    node.engine.inbox.append(
        Lend(id=request_id, tokens=list(tokens), lease_seconds=lease, cache_scope=scope)
    )


def ended(node: Node, request_id: str) -> Output | Rejected | None:
    """Return how a request ended on this node; None while it runs."""
    for message in reversed(node.engine.emitted):
        if isinstance(message, Rejected) and message.id == request_id:
            return message
        if isinstance(message, Output) and message.id == request_id and message.finish_reason:
            return message
    return None


def watch(nodes: list[Node], wire: Wire) -> None:
    """Fail as soon as a read writes to a block that is not kept for it."""

    def check(reader: str, copy: Copy) -> None:
        for node in nodes:
            if node.name == reader:
                check_block(node, copy.local)

    wire.on_write.append(check)


def check_block(node: Node, address: int) -> None:
    layout = node.layout
    size = layout.blocks * layout.block_tokens * layout.token_bytes
    base = next((a for a in (*layout.keys, *layout.values) if a <= address < a + size), None)
    if base is None:
        return  # a look at a ledger
    block = (address - base) // (layout.block_tokens * layout.token_bytes)
    kv = node.engine.parts.kv
    assert kv._pool.holders(block) == 1, f"block {block} has {kv._pool.holders(block)} holders"
    assert block not in kv._tree._by_block, f"block {block} is in the prefix cache"
    waiting = {r.sequence.id for r in node.exchange._reservations._reservations.values()}
    for sequence in node.engine.loop._requests._sequences.values():
        if block in sequence.table.blocks:
            assert sequence.id in waiting, f"block {block} is used by {sequence.id}"


def at_rest(node: Node) -> None:
    """Nothing is left of anything, except in the prefix cache."""
    exchange = node.exchange
    assert not node.engine.loop._requests
    assert not node.engine.loop._requests._waiting
    assert not len(node.engine.parts.gate)
    assert not len(exchange._offers)
    assert not len(exchange._reservations)
    assert not exchange._reservations.reading
    assert exchange._offers._slots.free == len(exchange._offers._slots.rows)
    assert node.reader._rows.free == len(node.reader._rows.rows)
    kv = node.engine.parts.kv
    assert kv.available == kv.blocks
