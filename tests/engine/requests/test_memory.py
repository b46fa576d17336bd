"""Order and bounds of who waits for KV memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.memory import PATIENCE_SECONDS, MemoryGate
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import Sampler
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.wire.engine import AddRequest, SamplingParams

BLOCK = 4


def sequence(
    name: str,
    blocks: int,
    arrival: float,
    priority: int = 0,
    tenant: str = "",
    service: ServiceLevel = ServiceLevel.USUAL,
) -> Sequence:
    """Distinct prompts, so that nothing is shared."""
    prompt = [hash_of(name)] * (blocks * BLOCK)
    request = AddRequest(
        id=name,
        prompt=prompt,
        sampling=SamplingParams(max_tokens=1),
        arrival=arrival,
        priority=priority,
        tenant=tenant,
        service=service,
    )
    sampler = Sampler(1000, torch.device("cpu"))
    sampling = sampler.start(name, prompt, request.sampling, frozenset(), default_seed=0)
    return Sequence(request, sampling, short=blocks < 3, tokens=list(prompt))


def reserve(gate: MemoryGate, one: Sequence, *, short: bool, now: float) -> bool:
    return gate.reserve(one, short, len(one.tokens), now)


def hash_of(name: str) -> int:
    return sum(ord(c) * 7**i for i, c in enumerate(name)) % 1000


def test_longs_leave_the_reserve_to_shorts() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=2)
    assert not reserve(gate, sequence("long", 9, 0.0), short=False, now=0.0)
    assert reserve(gate, sequence("short", 2, 1.0), short=True, now=1.0)
    assert len(gate) == 1


def test_parked_prompts_are_not_overtaken_within_their_class() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    holder = sequence("holder", 6, 0.0)
    assert reserve(gate, holder, short=False, now=0.0)
    large, small = sequence("large", 8, 1.0), sequence("small", 3, 2.0)
    assert not reserve(gate, large, short=False, now=1.0)
    assert not reserve(gate, small, short=False, now=2.0), "it would fit, but came later"
    assert gate.unpark(2.5) == []
    gate.release(holder)
    assert gate.unpark(3.0) == [large]
    gate.release(large)
    assert gate.unpark(4.0) == [small]
    assert len(gate) == 0


def test_a_long_that_has_waited_holds_back_later_shorts() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    holder = sequence("holder", 6, 0.0)
    assert reserve(gate, holder, short=False, now=0.0)
    patient = sequence("patient", 8, 1.0)
    assert not reserve(gate, patient, short=False, now=1.0)
    late = 1.0 + PATIENCE_SECONDS
    assert reserve(gate, sequence("early", 1, 2.0), short=True, now=late - 0.1)
    assert not reserve(gate, sequence("later", 1, 3.0), short=True, now=late)
    assert reserve(gate, sequence("before", 1, 0.5), short=True, now=late), "it is more entitled"
    gate.release(holder)
    assert [s.id for s in gate.unpark(late)] == ["patient"] or kv.available < 8


def test_an_aborted_prompt_holds_nobody_back() -> None:
    kv = KVManager(4, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    large, small = sequence("large", 5, 0.0), sequence("small", 1, 1.0)
    assert not reserve(gate, large, short=False, now=0.0)
    assert not reserve(gate, small, short=False, now=1.0)
    assert gate.backlog(False) == (2, 6 * BLOCK)
    assert gate.unpark(2.0) == []
    gate.release(large)
    assert gate.backlog(False) == (1, BLOCK)
    assert gate.unpark(3.0) == [small]
    assert gate.backlog(False) == (0, 0)


def test_asking_again_costs_nothing_until_something_changes() -> None:
    kv = KVManager(4, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    holder, waiting = sequence("holder", 3, 0.0), sequence("waiting", 2, 1.0)
    assert reserve(gate, holder, short=False, now=0.0)
    assert not reserve(gate, waiting, short=False, now=1.0)
    assert gate.unpark(2.0) == []
    waiting.tokens = None  # type: ignore[assignment]
    assert gate.unpark(3.0) == [], "it was looked at"


@given(
    ranks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=8),
    growing=st.integers(0, 7),
    flying=st.sets(st.integers(0, 7)),
)
def test_the_victim_is_the_least_entitled(
    ranks: list[tuple[int, int]], growing: int, flying: set[int]
) -> None:
    kv = KVManager(100, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    everyone = []
    for index, (priority, arrival) in enumerate(ranks):
        one = sequence(f"s{index}", 1, float(arrival), priority)
        assert reserve(gate, one, short=True, now=0.0)
        one.in_flight = index in flying
        everyone.append(one)
    me = everyone[growing % len(everyone)]
    victim = gate.victim(me)
    worse = [s for s in everyone if s.precedence > me.precedence and not s.in_flight]
    if not worse:
        assert victim is None
    else:
        assert victim is not None
        assert victim.precedence == max(s.precedence for s in worse)


def offline(name: str, blocks: int, arrival: float, computed: int = 0) -> Sequence:
    one = sequence(name, blocks, arrival, tenant="of lines", service=ServiceLevel.OFFLINE)
    one.computed = computed
    return one


def test_offline_requests_give_up_the_least_for_others() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    lines = [offline(f"line {i}", 3, 0.1 * i) for i in range(3)]
    for line, computed in zip(lines, (12, 4, 8), strict=True):
        assert reserve(gate, line, short=False, now=0.0)
        line.computed = computed
    asked = sequence("asked", 4, 1.0)
    assert not reserve(gate, asked, short=False, now=1.0)
    assert gate.overdrawn(1.0) == [lines[1]]
    gate.release(lines[1])
    assert gate.unpark(1.0) == [asked]
    assert gate.victim(asked) is lines[2], "it has less to compute again"
    assert gate.victim(lines[0]) is lines[2]
    gate.release(lines[2])
    assert gate.victim(lines[0]) is None, "others keep theirs"


def test_parked_offline_requests_hold_up_nobody() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    holder = sequence("holder", 6, 0.0)
    assert reserve(gate, holder, short=False, now=0.0)
    assert not reserve(gate, offline("line", 5, 0.0), short=False, now=0.0)
    late = 5 * PATIENCE_SECONDS
    assert reserve(gate, sequence("short", 2, late), short=True, now=late)
    assert not reserve(gate, sequence("long", 4, late), short=False, now=late)
    small = offline("small", 1, late)
    assert not reserve(gate, small, short=False, now=late), "somebody waits who comes first"
    assert gate.unpark(late) == []
    gate.release(holder)
    assert [one.id for one in gate.unpark(late)] == ["long"]
    assert kv.available == 4


def test_offline_requests_that_are_not_enough_keep_their_blocks() -> None:
    kv = KVManager(10, BLOCK)
    gate = MemoryGate(kv, short_reserve=0)
    assert reserve(gate, sequence("holder", 7, 0.0), short=False, now=0.0)
    line = offline("line", 2, 0.0)
    assert reserve(gate, line, short=False, now=0.0)
    assert not reserve(gate, sequence("asked", 5, 1.0), short=False, now=1.0)
    assert gate.overdrawn(1.0) == []
