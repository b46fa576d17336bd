"""Circuit, shares, the record of prefixes, costs: one at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.fleet.router.circuit import Circuit, CircuitOptions, CircuitState
from pla_serve.fleet.router.costs import FleetCost
from pla_serve.fleet.router.keys import IDLE_SECONDS, KeyShares
from pla_serve.fleet.router.prefixes import BLOCK, USED_SLACK, Chain, PrefixMark, PrefixRecord
from pla_serve.policy.cost import CostProfile

# Circuit


def test_a_circuit_opens_after_failures_in_a_row_only() -> None:
    circuit = Circuit(CircuitOptions(failures=3))
    for _ in range(5):
        circuit.failed(0.0)
        circuit.failed(0.0)
        circuit.succeeded()
    assert circuit.state(0.0) is CircuitState.CLOSED
    for _ in range(3):
        circuit.failed(0.0)
    assert circuit.state(0.0) is CircuitState.OPEN
    assert not circuit.allows(1.9)


def test_one_probe_decides() -> None:
    circuit = Circuit(CircuitOptions(failures=1, open_seconds=2, most_open_seconds=5))
    circuit.failed(0.0)
    assert circuit.state(2.0) is CircuitState.HALF_OPEN
    assert circuit.allows(2.0)
    circuit.sent("probe")
    assert not circuit.allows(2.0)
    circuit.failed(2.0)
    assert not circuit.allows(5.9)
    assert circuit.allows(6.0)
    circuit.sent("another")
    circuit.failed(6.0)
    assert circuit.allows(11.0), "5 s at most, not 8"
    circuit.sent("third")
    circuit.succeeded()
    assert circuit.state(11.0) is CircuitState.CLOSED


def test_a_probe_that_was_withdrawn_makes_room_for_another() -> None:
    circuit = Circuit(CircuitOptions(failures=1))
    circuit.failed(0.0)
    circuit.sent("probe")
    circuit.withdrawn("somebody else")
    assert not circuit.allows(2.0)
    circuit.withdrawn("probe")
    assert circuit.allows(2.0)


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"open_seconds": 0.0}, {"open_seconds": 99.0}])
def test_circuit_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="circuit"):
        CircuitOptions(**wrong)  # type: ignore[arg-type]


# Shares


def test_each_active_key_has_an_equal_part() -> None:
    shares = KeyShares()
    shares.charge("a", "1", 4.0, 0.0)
    assert not shares.entitled("a", 1.0, 4.0, 0.0)
    assert shares.entitled("b", 2.0, 4.0, 0.0)
    assert not shares.entitled("b", 2.1, 4.0, 0.0)
    shares.discharge("a", "1", 1.0)
    assert shares.entitled("a", 2.0, 4.0, 1.0)


def test_a_key_that_was_idle_for_a_while_has_no_part() -> None:
    shares = KeyShares()
    shares.charge("a", "1", 1.0, 0.0)
    shares.discharge("a", "1", 0.0)
    assert not shares.entitled("b", 3.0, 4.0, 1.0)
    assert shares.entitled("b", 3.0, 4.0, IDLE_SECONDS + 1.0)


# Prefixes


def tokens_of(*blocks: int) -> list[int]:
    return [block * 1000 + place for block in blocks for place in range(BLOCK)]


def test_a_chain_grows_as_if_it_had_been_made_at_once() -> None:
    tokens = tokens_of(1, 2, 3)[:-3]
    chain = Chain(tokens[:7])
    for start in range(7, len(tokens), 5):
        chain.extend(tokens[start : start + 5])
    assert chain.hashes == Chain(tokens).hashes
    assert len(chain.hashes) == 2


def test_a_prefix_is_not_expected_in_another_cache_scope() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    tokens = tokens_of(1, 2, 3)
    record.insert("a", Chain(tokens, "one tenant"))
    assert record.match(Chain(tokens, "one tenant")) == {"a": 3 * BLOCK}
    for scope in ("", "another tenant"):
        assert record.match(Chain(tokens, scope)) == {}
    assert Chain(tokens, "").hashes == Chain(tokens).hashes


def test_matches_are_per_instance() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    record.join("b", 0)
    record.insert("a", Chain(tokens_of(1, 2, 3)))
    record.insert("b", Chain(tokens_of(1, 9)))
    assert record.match(Chain(tokens_of(1, 2, 7))) == {"a": 2 * BLOCK, "b": BLOCK}
    assert record.match(Chain(tokens_of(5))) == {}
    assert record.match(Chain([1, 2])) == {}
    record.clear("a")
    assert record.match(Chain(tokens_of(1, 2, 7))) == {"b": BLOCK}


def test_a_record_that_is_taken_back_leaves_what_others_use() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    first = record.insert("a", Chain(tokens_of(1, 2, 3)))
    second = record.insert("a", Chain(tokens_of(1, 2, 4)))
    record.undo("a", first)
    assert record.match(Chain(tokens_of(1, 2, 3))) == {"a": 2 * BLOCK}
    record.undo("a", second)
    record.undo("a", second)
    assert record.match(Chain(tokens_of(1, 2, 4))) == {"a": 2 * BLOCK}, "not new to the second"
    # The blocks that both shared stay believed; an instance that lacks them says so.


def test_what_an_instance_did_not_have_takes_all_that_is_older_with_it() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    for block in (1, 2, 3):
        mark = record.insert("a", Chain(tokens_of(block, block + 10, block + 20)))
        record.confirm("a", mark, 0)
    mark = record.insert("a", Chain(tokens_of(2, 12, 22)))
    record.confirm("a", mark, 0)
    assert record.match(Chain(tokens_of(1, 11))) == {}
    assert record.match(Chain(tokens_of(2, 12))) == {"a": 2 * BLOCK}, "computed just now"
    assert record.match(Chain(tokens_of(3, 13))) == {"a": 2 * BLOCK}, "used later"


def test_two_of_one_prefix_at_once_are_no_proof_of_eviction() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    old = record.insert("a", Chain(tokens_of(9, 19)))
    record.confirm("a", old, 0)
    first = record.insert("a", Chain(tokens_of(1, 2, 3)))
    second = record.insert("a", Chain(tokens_of(1, 2, 3)))
    record.confirm("a", first, 0)
    record.confirm("a", second, 0)
    assert record.match(Chain(tokens_of(9, 19))) == {"a": 2 * BLOCK}


class SlowKept:
    """One instance's record block by block: the least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[int, int] = OrderedDict()
        self.pending: set[int] = set()
        self.stamp = 0

    def use(self, hashes: list[int]) -> tuple[int, list[int], list[int]]:
        self.stamp += 1
        before, new = [], []
        for block in hashes[: self.capacity]:
            stamp = self.blocks.get(block)
            if stamp is None or stamp in self.pending:
                break
            before.append(stamp)
        for block in reversed(hashes[: self.capacity]):
            if self.blocks.pop(block, None) is None:
                new.append(block)
            self.blocks[block] = self.stamp
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
        return self.stamp, new, before

    def confirm(self, mark: tuple[int, list[int], list[int]], missed: bool) -> None:
        stamp, _, before = mark
        if stamp not in self.pending:
            return
        self.pending.discard(stamp)
        if missed and len(before) > 1:
            for block in [b for b, used in self.blocks.items() if used <= before[1]]:
                del self.blocks[block]

    def undo(self, mark: tuple[int, list[int], list[int]]) -> None:
        stamp, new, _ = mark
        if stamp in self.pending:
            self.pending.discard(stamp)
            for block in new:
                if self.blocks.get(block) == stamp:
                    del self.blocks[block]


Step = tuple[str, int, Sequence[int]]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "confirm", "miss", "undo", "clear", "extend"]),
            st.integers(0, 2),
            st.lists(st.integers(0, 3), min_size=1, max_size=6),
        ),
        max_size=40,
    )
)
def test_the_record_is_bounded_and_its_index_is_its_content(steps: list[Step]) -> None:
    record = PrefixRecord()
    names = ["a", "b", "c"]
    slow = {name: SlowKept(5) for name in names}
    for name in names:
        record.join(name, 5 * BLOCK)
    marks: dict[str, list[tuple[PrefixMark, tuple[int, list[int], list[int]]]]]
    marks = {name: [] for name in names}
    for kind, which, blocks in steps:
        name, chain = names[which], Chain(tokens_of(*blocks))
        if kind == "insert":
            made = slow[name].use(chain.hashes)
            slow[name].pending.add(made[0])
            marks[name].append((record.insert(name, chain), made))
        elif kind == "extend":
            slow[name].use(chain.hashes)
            record.extend(name, chain)
        elif kind == "clear":
            slow[name].blocks.clear()
            slow[name].pending.clear()
            record.clear(name)
        elif marks[name]:
            mark, made = marks[name].pop(len(blocks) % len(marks[name]))
            if kind == "undo":
                slow[name].undo(made)
                record.undo(name, mark)
            else:
                slow[name].confirm(made, kind == "miss")
                record.confirm(name, mark, 0 if kind == "miss" else None)
        expected: dict[int, int] = {}
        for other, kept in record._instances.items():
            assert len(kept.blocks) <= 5
            assert kept.blocks.keys() == slow[other].blocks.keys()
            assert kept.used == sum(count for _, _, count in kept.uses)
            for block in kept.blocks:
                expected[block] = expected.get(block, 0) | kept.bit
        assert expected == record._holders
    for name in names:
        record.clear(name)
    assert len(record) == 0
    assert record._holders == {}


def test_what_is_used_again_and_again_takes_no_more_memory() -> None:
    record = PrefixRecord()
    record.join("a", 0)
    for _ in range(1000):
        record.extend("a", Chain(tokens_of(1, 2, 3)))
    (kept,) = record._instances.values()
    assert kept.used <= 4 * 3 + USED_SLACK + 3
    assert record.match(Chain(tokens_of(1, 2, 3))) == {"a": 3 * BLOCK}


# Costs


def test_the_fleet_costs_what_the_middle_instance_says() -> None:
    cost = FleetCost()
    for number, each in enumerate((1.0, 2.0, 9.0)):
        said = CostProfile(each, 0, 0, 0, 0)
        cost.said(f"i{number}", said, 100 * (number + 1), float(number * 2))
    assert cost.prefill_seconds(10, 0) == pytest.approx(20.0)
    assert cost.boundary_tokens == 200


def test_costs_are_learnt_where_nobody_tells() -> None:
    cost = FleetCost()
    for number in range(300):
        tokens = 32 + 37 * (number % 50)
        cost.saw(f"r{number}", tokens, 0, 0.01 + 2e-5 * tokens)
    assert cost.prefill_seconds(1000, 0) == pytest.approx(0.03, rel=0.2)
