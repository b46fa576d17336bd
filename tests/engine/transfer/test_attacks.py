"""Offers, leases and tokens of an attacker: each costs the attacker's own request and no other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.transfer.credentials import (
    CLOCK_SKEW_SECONDS,
)
from pla_serve.engine.transfer.layout import Copy, KVSource
from pla_serve.engine.transfer.offers import PREFILL_SECONDS
from pla_serve.engine.transfer.transport import TransferOperation
from pla_serve.wire.engine import Begin, Output, Rejected, Release, Reserve
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE, SIGNATURE_BYTES, bind
from pla_serve.wire.limits import MOST_OFFER_BYTES
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
VICTIM = tuple(range(20, 90))
NOT_NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 1e300)


@pytest.fixture
def world() -> World:
    return World()


def pair(world: World) -> tuple[Node, Node]:
    nodes = world.node(0, ChaosPolicy(1, express=0.0)), world.node(1, ChaosPolicy(2))
    watch(list(nodes), world.wire)
    return nodes


def offered(world: World, node: Node, name: str, prompt: Sequence[int]) -> bytes:
    node.engine.inbox.append(request(name, prompt, lease=LEASE))
    world.move(node)
    return offer_of(node, name).source


def edited(offer: bytes, **changes: object) -> bytes:
    """Change fields, and leave the signature as it is."""
    source = msgspec.msgpack.decode(offer[:-SIGNATURE_BYTES], type=KVSource)
    changed = msgspec.structs.replace(source, **changes)
    return msgspec.msgpack.encode(changed) + offer[-SIGNATURE_BYTES:]


def refused(world: World, node: Node, name: str, prompt: Sequence[int], offer: bytes) -> str:
    """Reserve with a bad offer: nothing is read, nothing cached; returns the reason given."""
    cached, reads = node.engine.parts.kv.cached_tokens, node.exchange.stats().bytes_read
    node.engine.inbox.append(
        Reserve(request=request(name, prompt), source=offer, lease_seconds=LEASE)
    )
    world.move(node)
    refusal = ended(node, name)
    assert isinstance(refusal, Rejected)
    assert not world.wire.reads
    assert node.exchange.stats().bytes_read == reads
    assert node.engine.parts.kv.cached_tokens == cached
    assert not len(node.exchange._reservations)
    serves(world, node, f"{name}-innocent", prompt)
    return refusal.reason


def serves(world: World, node: Node, name: str, prompt: Sequence[int]) -> None:
    """The engine computes such a request by itself, and right."""
    node.engine.add(name, prompt)
    world.move(node)
    assert node.engine.tokens(name) == expected("llama", tuple(prompt), 8)


def test_edited_runs_read_nobodys_kv(world: World) -> None:
    """The attacker has an offer of their own, and points it at the blocks of somebody else."""
    p, d = pair(world)
    offered(world, p, "victim", VICTIM)
    own = offered(world, p, "own", PROMPT)
    blocks = p.engine.parts.kv.blocks
    for number, runs in enumerate(([(0, blocks)], [(0, 18)], [(-18, 0)], [(2**40, 2**40 + 18)])):
        bound = bind(edited(own, runs=runs), d.name)
        assert "signed" in refused(world, d, f"x{number}", PROMPT, bound)


def test_offers_swapped_between_requests_are_refused(world: World) -> None:
    p, d = pair(world)
    swapped = bind(offered(world, p, "victim", VICTIM), d.name)
    assert "other tokens" in refused(world, d, "x", PROMPT, swapped)
    # Also when the attacker guesses all but the last token.
    assert "other tokens" in refused(world, d, "y", (*VICTIM[:-1], 3), swapped)
    assert "other tokens" in refused(world, d, "z", VICTIM[:-1], swapped)


def test_an_offer_is_for_requests_of_its_cache_scope(world: World) -> None:
    p, d = pair(world)
    p.engine.inbox.append(request("x", PROMPT, lease=LEASE, cache_scope="a"))
    world.move(p)
    offer = offer_of(p, "x").source
    assert "other tokens" in refused(world, d, "y", PROMPT, bind(offer, d.name))
    reserve(d, request("z", PROMPT, cache_scope="a"), offer)
    d.engine.inbox.append(Begin(id="z", tokens=list(p.engine.tokens("x"))))
    world.move(d)
    assert d.exchange.stats().taken_over == 1


def test_a_lend_for_another_scope_finds_nothing(world: World) -> None:
    p, _ = pair(world)
    p.engine.inbox.append(request("x", PROMPT, cache_scope="a"))
    world.move(p)
    for scope in ("", "b", "a"):
        lend(p, f"lend {scope}", PROMPT, scope)
        world.move(p)
        covered = len(PROMPT) // BLOCK * BLOCK if scope == "a" else 0
        assert offer_of(p, f"lend {scope}").tokens == covered


def test_a_replayed_offer_is_refused_once_it_has_expired(world: World) -> None:
    p, d = pair(world)
    offer = bind(offered(world, p, "x", PROMPT), d.name)
    world.clock.now += PREFILL_SECONDS + CLOCK_SKEW_SECONDS + 2
    assert "expired" in refused(world, d, "x", PROMPT, offer)


def test_an_offer_replayed_after_its_release_costs_its_request_time_only(world: World) -> None:
    p, d = pair(world)
    offer = offered(world, p, "x", PROMPT)
    p.engine.inbox.append(Release("x"))
    world.move(p)
    for index in range(12):  # other KV in all of its blocks
        p.engine.add(f"other{index}", [index + 1] * 80, max_tokens=2)
    world.move(p)
    reserve(d, request("again", PROMPT), offer)
    d.engine.inbox.append(Begin(id="again", tokens=[]))
    world.move(d)
    assert d.engine.tokens("again") == expected("llama", PROMPT, 8)
    assert d.exchange.stats().recomputed == 1
    at_rest(d)


@pytest.mark.parametrize("reader", [None, "", "pla-somebody-else"])
def test_an_offer_for_another_reader_is_refused(world: World, reader: str | None) -> None:
    p, d = pair(world)
    offer = offered(world, p, "x", PROMPT)
    bound = offer if reader is None else bind(offer, reader)
    reason = refused(world, d, "x", PROMPT, bound)
    assert d.name in reason
    # A reader cannot pass on what it was given either.
    assert "signed" in refused(world, d, "y", PROMPT, bind(bind(offer, p.name), d.name))


def test_without_a_common_secret_offers_are_refused_and_the_cure_is_named(world: World) -> None:
    p, d = world.node(0, ChaosPolicy(1)), world.node(1, ChaosPolicy(2), secret=b"its own")
    reason = refused(world, d, "x", PROMPT, bind(offered(world, p, "x", PROMPT), d.name))
    assert FLEET_SECRET_VARIABLE in reason


@pytest.mark.parametrize("cut", [0, 1, 5, 100, -1, -SIGNATURE_BYTES - 1])
def test_a_truncated_offer_is_refused(world: World, cut: int) -> None:
    p, d = pair(world)
    offer = bind(offered(world, p, "x", PROMPT), d.name)
    refused(world, d, "x", PROMPT, offer[:cut] or b"\0")


def test_a_huge_offer_is_refused_unread(world: World) -> None:
    _, d = pair(world)
    assert "bytes" in refused(world, d, "x", PROMPT, bytes(MOST_OFFER_BYTES + 1))


@pytest.mark.parametrize("seconds", NOT_NUMBERS)
def test_leases_are_finite_and_bounded(world: World, seconds: float) -> None:
    p, d = pair(world)
    offer = offered(world, p, "x", PROMPT)
    p.engine.inbox.append(request("y", PROMPT, lease=seconds))
    lend(p, "z", PROMPT, lease=seconds)
    reserve(d, request("x", PROMPT), offer, seconds)
    world.move(p, d)
    assert isinstance(ended(p, "y"), Rejected)
    assert offer_of(p, "z").source == b""
    assert isinstance(ended(d, "x"), Rejected)
    p.engine.inbox.append(Release("x"))
    world.move(p, d)
    at_rest(p)
    at_rest(d)


def test_lending_looks_up_no_prompt_that_cannot_be_one(world: World) -> None:
    p, _ = pair(world)
    lend(p, "long", [1] * 100_000)
    lend(p, "large", [2**70, -5] * 40)
    world.move(p)
    for name in ("long", "large"):
        assert offer_of(p, name).source == b""
    at_rest(p)


def test_begin_with_more_tokens_than_were_asked_for_fails_that_request(world: World) -> None:
    p, d = pair(world)
    offer = offered(world, p, "x", PROMPT)
    reserve(d, request("x", PROMPT), offer)
    d.engine.inbox.append(Begin(id="x", tokens=[5] * 1_000_000))
    world.move(d)
    end = ended(d, "x")
    assert isinstance(end, Output)
    assert end.finish_reason == "error"
    serves(world, d, "innocent", PROMPT)
    at_rest(d)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_an_engine_survives_any_messages(seed: int) -> None:
    """Random bytes, edited offers and tokens; honest requests are answered right all the while."""
    rng = Random(seed)
    world = World()
    p, d = pair(world)
    good = offered(world, p, "x", PROMPT)
    for number in range(8):
        at = rng.randrange(len(good))
        bad = rng.choice(
            (
                rng.randbytes(rng.randrange(200)),
                good[:at],
                good[:at] + rng.randbytes(1) + good[at + 1 :],
                bind(good, rng.choice((p.name, d.name))),
            )
        )
        prompt = rng.choice((PROMPT, VICTIM, (1,)))
        d.engine.inbox.append(
            Reserve(
                request=request(f"r{number}", prompt),
                source=bad,
                lease_seconds=rng.choice((*NOT_NUMBERS, LEASE)),
            )
        )
        if rng.random() < 0.5:
            tokens = [rng.choice((-1, 3, 2**40)) for _ in range(rng.randrange(3))]
            d.engine.inbox.append(Begin(id=f"r{number}", tokens=tokens))
        if rng.random() < 0.5:
            d.step()
            d.reader.step()
            world.wire.settle()
    world.move(p, d)
    serves(world, d, "innocent", PROMPT)
    world.clock.now += 2 * LEASE
    world.move(p, d)
    at_rest(d)


# Faults of the transport


class Broken(Exception):
    """An error that no transport should raise."""


def breaks(monkeypatch: pytest.MonkeyPatch, node: Node, when: str) -> Callable[[], None]:
    """Let reads of this node raise when they begin, or when they are asked whether they are done.

    Returns:
        What to call so that running reads raise no longer.
    """
    transport = node.reader._transport
    read: Callable[..., TransferOperation] = transport.read
    broken = [True]

    class Failing:
        def __init__(self, operation: TransferOperation) -> None:
            self._operation = operation

        def done(self) -> bool:
            if broken:
                raise Broken
            return self._operation.done()

    def failing(agent: str, metadata: bytes, copies: Sequence[Copy]) -> TransferOperation:
        if when == "begin":
            raise Broken
        return Failing(read(agent, metadata, copies))

    monkeypatch.setattr(transport, "read", failing)
    return broken.clear


@pytest.mark.parametrize("when", ["begin", "done"])
def test_an_unknown_error_of_one_read_fails_that_read_alone(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    p, d = pair(world)
    offer = offered(world, p, "x", PROMPT)
    with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
        mend = breaks(broken, d, when)
        reserve(d, request("x", PROMPT), offer)
        d.engine.inbox.append(Begin(id="x", tokens=list(p.engine.tokens("x"))))
        for _ in range(100):
            world.clock.now += 0.1
            d.step()
            d.reader.step()
    assert (*p.engine.tokens("x"), *d.engine.tokens("x")) == expected("llama", PROMPT, 8)
    assert d.exchange.stats().recomputed == 1
    assert len(caplog.records) == 1, "logged once"
    kv = d.engine.parts.kv
    # Of a read whose end is unknown nobody can say that it writes no more.
    assert (kv.available < kv.blocks) == (when == "done")
    mend()
    reserve(d, request("next", VICTIM), offered(world, p, "next", VICTIM))
    d.engine.inbox.append(Begin(id="next", tokens=list(p.engine.tokens("next"))))
    world.move(d)
    assert (*p.engine.tokens("next"), *d.engine.tokens("next")) == expected("llama", VICTIM, 8)
    assert d.exchange.stats().taken_over == 1
    at_rest(d)
