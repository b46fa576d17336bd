"""Addresses, the ledger, and what offers do to the prefix cache, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.transfer import installed, nixl
from pla_serve.engine.transfer.credentials import Credentials
from pla_serve.engine.transfer.layout import KVLayout, KVSource, fingerprint
from pla_serve.engine.transfer.ledger import LedgerReading, Slots
from pla_serve.engine.transfer.offers import Offers
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import Begin
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import BLOCK, expected, make_engine
from tests.engine.transfer.world import LEASE, World, at_rest, offer_of, request, reserve, watch

SHAPE = KVShape(layers=2, heads=2, head_dim=4, dtype=torch.float32)


def layout(cache: KVCache) -> KVLayout:
    return KVLayout.of(cache, BLOCK, "w")


def source_of(layout: KVLayout, runs: list[BlockRun], tokens: int) -> KVSource:
    return KVSource(
        kind=layout.kind,
        agent="a",
        metadata=b"",
        slot=1,
        generation=1,
        tokens=tokens,
        token_hash=b"",
        runs=runs,
        blocks=layout.blocks,
        keys=layout.keys,
        values=layout.values,
        expires=0,
    )


def scattered(blocks: Sequence[int]) -> list[BlockRun]:
    return [(block, block + 1) for block in blocks]


@given(st.data())
def test_copies_take_each_token_to_its_place(data: st.DataObject) -> None:
    blocks = 6
    count = data.draw(st.integers(1, blocks))
    here, there = (data.draw(st.permutations(range(blocks))) for _ in range(2))
    start = data.draw(st.integers(0, count * BLOCK - 1))
    stop = data.draw(st.integers(start + 1, count * BLOCK))
    caches = [KVCache(SHAPE, blocks * BLOCK, torch.device("cpu")) for _ in range(2)]
    mine, other = (layout(cache) for cache in caches)
    # Every token of the other side holds its own number; slots are followed one by one here.
    size = mine.token_bytes
    placed = {
        other.keys[1] + (there[t // BLOCK] * BLOCK + t % BLOCK) * size: t
        for t in range(count * BLOCK)
    }
    source = source_of(other, scattered(there[:count]), count * BLOCK)
    moved: dict[int, int] = {}
    for copy in mine.copies(scattered(here[:count]), source, 1, start, stop):
        for at in range(0, copy.size, size):
            if copy.remote + at in placed:
                moved[placed[copy.remote + at]] = copy.local + at
    right = {
        t: mine.keys[1] + (here[t // BLOCK] * BLOCK + t % BLOCK) * size for t in range(start, stop)
    }
    assert moved == right


def test_neighbours_move_as_one() -> None:
    mine = layout(KVCache(SHAPE, 40, torch.device("cpu")))
    copies = mine.copies([(2, 6)], source_of(mine, [(5, 9)], 16), 0, 0, 16)
    assert [copy.size for copy in copies] == [16 * mine.token_bytes] * 2


@given(st.integers(0, 2**62), st.integers(0, 2**24), st.integers(0, 2**24), st.integers(0, 2**15))
def test_a_slot_says_what_was_written(generation: int, whole: int, chunk: int, layers: int) -> None:
    slots = Slots(3)
    progress = LedgerReading(generation, whole, chunk, layers)
    slots.write(1, progress)
    assert slots.read(1) == progress
    assert slots.read(0) is None
    assert slots.address(1) % 64 == 0


@given(st.integers(1, 31), st.integers(0, 1000), st.integers(0, 1000))
def test_a_torn_slot_is_nothing(cut: int, before: int, after: int) -> None:
    """A reader that sees some bytes of one state and some of the next sees neither."""
    slots = Slots(3)
    slots.write(0, LedgerReading(5, before, 0, 0))
    slots.write(1, LedgerReading(5, after, 0, 0))
    old, new = (bytes(slots.rows[row].view("uint8")[:32]) for row in (0, 1))
    slots.rows[2].view("uint8")[:32] = list(new[:cut] + old[cut:])
    assert slots.read(2) in (None, slots.read(0), slots.read(1))


def test_a_claim_covers_computed_layers_only() -> None:
    progress = LedgerReading(1, whole=8, chunk=20, layers=2)
    assert [progress.available(layer) for layer in range(3)] == [20, 20, 8]


def offers_of(kv: KVManager) -> Offers:
    cache = KVCache(SHAPE, kv.blocks * BLOCK, torch.device("cpu"))
    return Offers(
        kv,
        layout(cache),
        Slots(2),
        Credentials(b"secret", UUID(int=1), lambda: 0.0),
        agent="a",
        metadata=b"",
        generation=1,
    )


def test_blocks_that_the_cache_replaced_are_held_with_their_path() -> None:
    """Two of the same prompt at once: the second one's blocks end up under those of the first."""
    kv = KVManager(8, BLOCK)
    offers = offers_of(kv)
    tokens = list(range(3 * BLOCK))
    first, second = BlockTable(), BlockTable()
    kv.reserve(tokens, first)
    kv.reserve(tokens, second)
    kv.remember(tokens, BLOCK, first)
    offers.open("second", second.blocks, tokens, 0)
    kv.remember(tokens, len(tokens), second)
    kv.release(first)
    offers.keep("second", second.blocks, until=1.0)
    kv.release(second)
    # What can be evicted is taken by others, and that is not what was offered.
    other = BlockTable()
    assert kv.reserve([99] * (kv.available * BLOCK), other) == 0
    assert not set(other.blocks) & set(second.blocks)
    kv.release(other)
    offers.drop("second")
    assert kv.available == kv.blocks


def test_a_full_ledger_offers_nothing_and_holds_nothing() -> None:
    kv = KVManager(8, BLOCK)
    offers = offers_of(kv)
    table = BlockTable()
    kv.reserve(list(range(8)), table)
    assert offers.open("a", table.blocks, range(8), 0)
    assert offers.open("b", table.blocks, range(8), 0)
    assert not offers.open("c", table.blocks, range(8), 0)
    assert "c" not in offers
    offers.drop("a")
    assert offers.open("d", table.blocks, range(8), 0)
    for name in ("b", "d"):
        offers.drop(name)
    kv.release(table)
    assert kv.available == kv.blocks


def test_an_offer_gives_way_when_its_prefill_does() -> None:
    """A decode step that needs memory gets it from a prefill that is being handed over."""
    world = World()
    policy = create_policy("fcfs", PolicyConfig(max_batch_tokens=8), CostModel())
    node = world.node(0, policy, blocks=30)
    node.engine.inbox.append(request("old", range(1, 41), max_tokens=40, ignore_eos=True))
    for _ in range(8):
        node.step()
    prompt = tuple(range(20, 90))
    node.engine.inbox.append(request("new", prompt, lease=LEASE, priority=1))
    world.move(node)
    assert node.engine.loop._telemetry.recompute_preemptions == 1
    assert node.engine.tokens("old") == world.alone("old", range(1, 41), 40)
    assert node.engine.tokens("new") == expected("llama", prompt, 1)
    assert not len(node.exchange._offers), "what was preempted is not offered any more"
    at_rest(node)


def test_memory_that_is_being_read_into_is_no_ones_prey() -> None:
    world = World()
    p = world.node(0, ChaosPolicy(1))
    d = world.node(1, create_policy("fcfs", PolicyConfig(), CostModel()), blocks=30)
    watch([p, d], world.wire)
    prompt = tuple(range(1, 71))
    p.engine.inbox.append(request("x", prompt, lease=LEASE))
    world.move(p)
    d.engine.inbox.append(request("grows", range(50, 80), max_tokens=40, ignore_eos=True))
    d.step()
    reserve(d, request("x", prompt, priority=1), offer_of(p, "x").source)
    for _ in range(200):
        d.step()
    assert d.exchange.stats().reserved == 1
    assert not d.engine.outputs("x"), "it was computed before it was begun"
    first = list(p.engine.tokens("x"))
    d.engine.inbox.append(Begin(id="x", tokens=first))
    world.move(d)
    assert (*first, *d.engine.tokens("x")) == expected("llama", prompt, 8)
    assert d.engine.tokens("grows") == world.alone("grows", range(50, 80), 40)
    at_rest(d)


def test_without_kv_transfer_everything_of_it_is_refused() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.inbox.append(request("x", [1, 2], lease=1.0))
    engine.inbox.append(Begin(id="y", tokens=[]))
    engine.run()
    for name in ("x", "y"):
        refusal = engine.rejected(name)
        assert refusal is not None
        assert "--kv-transfer" in refusal.reason


def test_fingerprints_tell_weights_apart() -> None:
    model = torch.nn.Linear(100, 100)
    before = fingerprint(model)
    assert fingerprint(model) == before
    assert fingerprint(torch.nn.Linear(100, 50)) != before
    with torch.no_grad():
        model.weight.add_(1.0)
    assert fingerprint(model) != before


def test_a_gpu_is_refused_with_the_reason() -> None:
    cache = KVCache(SHAPE, 8, torch.device("meta"))
    with pytest.raises(ValueError, match="processor's memory"):
        layout(cache)


def test_without_nixl_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "MODULES", ("nixl_of_no_one",))
    with pytest.raises(ValueError, match=r"pip install .pla-serve\[transfer\]"):
        nixl.NixlTransport("x", [])
