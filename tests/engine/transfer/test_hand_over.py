"""A request is prefilled by one engine and decoded by another, as if by one."""

from __future__ import annotations

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    Begin,
    EngineStats,
    Output,
    Rejected,
    Release,
)
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import BLOCK, expected
from tests.engine.transfer.world import (
    LEASE,
    Node,
    World,
    at_rest,
    ended,
    lend,
    offer_of,
    request,
    reserve,
    watch,
)

PROMPT = tuple(range(1, 71))


class Killed(Exception):
    """In the middle of a pass."""


@pytest.fixture
def world() -> World:
    return World()


def pair(world: World) -> tuple[Node, Node]:
    nodes = world.node(0, ChaosPolicy(1, express=0.0)), world.node(1, ChaosPolicy(2))
    watch(list(nodes), world.wire)
    return nodes


def chunked(tokens: int) -> PrefillPolicy:
    """First come, first served, so many tokens in a pass."""
    return create_policy("fcfs", PolicyConfig(max_batch_tokens=tokens), CostModel())


def prefill(world: World, node: Node, **sampling: object) -> bytes:
    """Hand ``x`` over; the source."""
    node.engine.inbox.append(request("x", PROMPT, lease=LEASE, **sampling))
    world.move(node)
    return offer_of(node, "x").source


def begin_to_read(world: World, node: Node) -> None:
    """Up to a read of KV that is under way."""
    node.reader.step()
    world.wire.settle()
    node.reader.step()
    node.reader.step()
    assert len(world.wire.reads[0].left) > 1


def first_tokens(node: Node) -> list[int]:
    return [t for o in node.engine.outputs("x") for t in o.tokens]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
def test_tokens_are_those_of_one_engine(world: World, sampling: dict[str, object]) -> None:
    p, d = pair(world)
    alone = world.node(2, ChaosPolicy(3))
    alone.engine.inbox.append(request("x", PROMPT, **sampling))
    world.move(alone)
    source = prefill(world, p, **sampling)
    (made,) = p.engine.outputs("x")
    assert made.finish_reason == "handed_over"
    reserve(d, request("x", PROMPT, **sampling), source)
    d.engine.inbox.append(Begin(id="x", tokens=made.tokens))
    world.move(p, d)
    assert (*made.tokens, *d.engine.tokens("x")) == alone.engine.tokens("x")
    assert d.exchange.stats().taken_over == 1
    # Nothing was computed but the decode steps.
    assert d.engine.loop._telemetry.prompt_tokens == 0
    p.engine.inbox.append(Release("x"))
    world.move(p, d)
    at_rest(p)
    at_rest(d)


def test_only_what_is_missing_moves(world: World) -> None:
    p, d = pair(world)
    d.engine.add("before", PROMPT[:40], max_tokens=1)
    world.move(d)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)))
    world.move(d)
    (accepted,) = d.find(Accepted, "x")
    assert isinstance(accepted, Accepted)
    assert accepted.cached_tokens == 40
    token = 2 * d.layout.token_bytes * d.layout.layers
    assert d.exchange.stats().bytes_read == (len(PROMPT) - 40) * token
    assert (*first_tokens(p), *d.engine.tokens("x")) == expected("llama", PROMPT, 8)


def test_what_is_taken_over_is_cached_for_the_next_turn(world: World) -> None:
    p, d = pair(world)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)))
    world.move(d)
    answer = (*first_tokens(p), *d.engine.tokens("x"))
    follow_up = (*PROMPT, *answer, 5)
    d.engine.add("next", follow_up)
    world.move(d)
    whole = (len(PROMPT) + len(answer) - 1) // BLOCK * BLOCK
    assert d.engine.outputs("next")[0].cached_tokens == whole
    assert d.engine.tokens("next") == expected("llama", follow_up, 8)


def test_layers_move_while_later_ones_are_computed(world: World) -> None:
    p, d = world.node(0, chunked(1024)), world.node(1, ChaosPolicy(2))
    seen: list[tuple[int, int]] = []

    def boundary() -> None:
        for message in p.news():
            if getattr(message, "source", b""):
                reserve(d, request("x", PROMPT), message.source)
        for _ in range(6):
            d.step()
            d.reader.step()
            world.wire.settle()
        stats = d.exchange.stats()
        seen.append((stats.bytes_read, stats.bytes_early))

    p.engine.on_poll.append(boundary)
    p.engine.inbox.append(request("x", PROMPT, lease=LEASE))
    p.step()
    layer = 2 * d.layout.token_bytes * len(PROMPT)
    # Boundaries before layers 1, 2 and 3: what is behind them has moved, layer by layer.
    assert [read for read, _ in seen][-3:] == [0, layer, 2 * layer]
    assert all(early == read for read, early in seen)
    p.engine.on_poll.clear()
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)))
    world.move(p, d)
    stats = d.exchange.stats()
    assert (stats.bytes_read, stats.bytes_early) == (3 * layer, 2 * layer)
    assert (*first_tokens(p), *d.engine.tokens("x")) == expected("llama", PROMPT, 8)


def test_a_first_token_that_ends_the_request_is_the_end(world: World) -> None:
    p, d = pair(world)
    source = prefill(world, p, max_tokens=1)
    (made,) = p.engine.outputs("x")
    assert made.finish_reason == "length"
    at_rest(p)
    reserve(d, request("x", PROMPT, max_tokens=1), source)
    d.engine.inbox.append(AbortRequest("x"))
    world.move(p, d)
    at_rest(d)


def test_begin_with_a_token_that_ends_it_ends_it(world: World) -> None:
    p, d = pair(world)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT, max_tokens=1), source)
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)))
    world.move(d)
    assert [o.finish_reason for o in d.engine.outputs("x")] == ["length"]
    at_rest(d)


def test_an_offer_ends_with_its_lease(world: World) -> None:
    p, _ = pair(world)
    prefill(world, p)
    assert p.engine.parts.kv.available < p.engine.parts.kv.blocks
    world.clock.now += LEASE
    p.step()
    at_rest(p)
    assert p.exchange.stats().expired == 1
    told = [
        message.load.kv_usage for message in p.engine.emitted if isinstance(message, EngineStats)
    ]
    assert told[-1] == 0  # an engine that is idle says so all the same


def test_a_reservation_ends_with_its_lease(world: World) -> None:
    p, d = pair(world)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    world.move(d)
    world.clock.now += LEASE + 1
    world.move(d)
    end = ended(d, "x")
    assert isinstance(end, Output)
    assert end.finish_reason == "error"
    assert "nobody began" in (end.error or "")
    at_rest(d)
    d.engine.inbox.append(Begin(id="x", tokens=[3]))
    world.move(d)
    assert isinstance(ended(d, "x"), Rejected)


def test_the_writer_dies_before_the_first_token(world: World) -> None:
    """The engine that reserved keeps the KV that was confirmed and computes the rest."""
    p, d = world.node(0, chunked(16)), world.node(1, ChaosPolicy(2))
    polls: list[int] = []

    def boundary() -> None:
        polls.append(1)
        for message in p.news():
            if getattr(message, "source", b""):
                reserve(d, request("x", PROMPT), message.source)
        for _ in range(6):
            d.step()
            d.reader.step()
            world.wire.settle()
        if len(polls) == 12:
            raise Killed

    p.engine.on_poll.append(boundary)
    p.engine.inbox.append(request("x", PROMPT, lease=LEASE))
    with pytest.raises(Killed):
        world.move(p)
    world.wire.kill(p.name)
    assert not p.engine.outputs("x"), "the test is too slow"
    d.engine.inbox.append(Begin(id="x", tokens=[]))
    world.move(d)
    assert d.engine.tokens("x") == expected("llama", PROMPT, 8)
    computed = d.engine.loop._telemetry.prompt_tokens
    assert 0 < computed < len(PROMPT), "chunks that were confirmed are not computed again"
    assert d.exchange.stats().recomputed == 1
    at_rest(d)


def test_a_read_that_never_ends_does_not_hold_the_request(world: World) -> None:
    p, d = pair(world)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    d.step()
    begin_to_read(world, d)
    world.wire.stuck.add(p.name)
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)))
    for _ in range(100):
        world.clock.now += 0.1
        d.step()
        d.reader.step()
    assert (*first_tokens(p), *d.engine.tokens("x")) == expected("llama", PROMPT, 8)
    kv = d.engine.parts.kv
    assert kv.available < kv.blocks, "blocks that may still be written to were given back"
    world.wire.stuck.clear()
    world.move(d)
    at_rest(d)


def test_an_offer_withdrawn_under_a_reader_is_not_used(world: World) -> None:
    """Stopped for longer than the lease, the reader wakes up among blocks of someone else."""
    p, d = pair(world)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    d.step()
    begin_to_read(world, d)
    world.clock.now += LEASE
    p.step()
    # All memory of the first engine is used for something else.
    for index in range(12):
        p.engine.add(f"other{index}", [index + 1] * 80, max_tokens=2)
    for _ in range(200):
        p.step()
    world.clock.now -= LEASE
    d.engine.inbox.append(Begin(id="x", tokens=first_tokens(p)[:1]))
    world.move(d)
    assert d.exchange.stats().recomputed == 1
    assert d.engine.tokens("x") == expected("llama", PROMPT, 8)[1:]
    at_rest(d)


def test_without_memory_a_reservation_is_refused_at_once(world: World) -> None:
    p = world.node(0, ChaosPolicy(1))
    d = world.node(1, ChaosPolicy(2), blocks=24)
    source = prefill(world, p)
    reserve(d, request("x", PROMPT), source)
    reserve(d, request("y", PROMPT[::-1]), b"")
    world.move(d)
    refusal = ended(d, "y")
    assert isinstance(refusal, Rejected)
    assert refusal.retry_after
    assert "no KV memory" in refusal.reason
    assert ended(d, "x") is None


def test_kv_of_another_model_is_refused(world: World) -> None:
    p, _ = pair(world)
    source = prefill(world, p)
    other = World(model="qwen3").node(3, ChaosPolicy(0))
    reserve(other, request("x", PROMPT), source)
    other.step()
    refusal = ended(other, "x")
    assert isinstance(refusal, Rejected)
    assert "another kind" in refusal.reason
    reserve(other, request("y", PROMPT), b"nonsense")
    other.step()
    assert isinstance(ended(other, "y"), Rejected)
    at_rest(other)


def test_a_cached_prefix_is_lent(world: World) -> None:
    owner, other = pair(world)
    owner.engine.add("first", PROMPT, max_tokens=1)
    world.move(owner)
    prompt = (*PROMPT, 3, 1, 4, 1, 5)
    lend(owner, "x", prompt)
    world.move(owner)
    offer = offer_of(owner, "x")
    assert offer.tokens == len(PROMPT) // BLOCK * BLOCK
    reserve(other, request("x", prompt), offer.source)
    other.engine.inbox.append(Begin(id="x", tokens=[]))
    world.move(other)
    assert other.engine.tokens("x") == expected("llama", prompt, 8)
    assert other.engine.loop._telemetry.prompt_tokens == len(prompt) - offer.tokens
    owner.engine.inbox.append(Release("x"))
    world.move(owner)
    at_rest(owner)
    at_rest(other)


def test_nothing_cached_is_an_empty_offer(world: World) -> None:
    owner, _ = pair(world)
    lend(owner, "x", PROMPT)
    world.move(owner)
    assert (offer_of(owner, "x").source, offer_of(owner, "x").tokens) == (b"", 0)
    at_rest(owner)
