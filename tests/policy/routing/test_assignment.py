"""Which instance takes over which running request, against all possibilities tried one by one."""

from __future__ import annotations

import random
from itertools import product

import pytest

from pla_serve.policy.routing.assignment import Host, Mover, assign

CROWD = 0.1


def seconds(tokens: int) -> float:
    return tokens / 1000


def cost(movers: list[Mover], hosts: list[Host], places: tuple[int, ...]) -> float:
    total, taken = 0.0, [0] * len(hosts)
    for mover, place in zip(movers, places, strict=True):
        host = hosts[place]
        missing = max(0, mover.tokens - mover.cached.get(host.name, 0))
        total += seconds(missing) + host.wait + CROWD * taken[place]
        taken[place] += 1
    return total


@pytest.mark.parametrize("seed", range(25))
def test_the_sum_of_costs_is_least_where_there_is_room_for_all(seed: int) -> None:
    chance = random.Random(seed)
    hosts = [Host(f"h{n}", 100_000, chance.random()) for n in range(chance.randint(1, 3))]
    movers = [
        Mover(chance.randint(1, 4000), {h.name: chance.randint(0, 4000) for h in hosts})
        for _ in range(chance.randint(1, 5))
    ]
    places = assign(movers, hosts, seconds, CROWD)
    names = [host.name for host in hosts]
    found = cost(movers, hosts, tuple(names.index(str(name)) for name in places))
    every = product(range(len(hosts)), repeat=len(movers))
    assert found == pytest.approx(min(cost(movers, hosts, each) for each in every))


def test_requests_go_where_their_kv_is_already() -> None:
    movers = [Mover(4000, {"b": 4000}), Mover(4000, {"a": 4000})]
    hosts = [Host("a", 8000, 0.0), Host("b", 8000, 0.0)]
    assert assign(movers, hosts, seconds, CROWD) == ["b", "a"]


def test_equal_requests_spread() -> None:
    hosts = [Host("a", 9000, 0.0), Host("b", 9000, 0.0)]
    places = assign([Mover(100, {})] * 6, hosts, seconds, CROWD)
    assert sorted(map(str, places)) == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("seed", range(25))
def test_no_host_gets_more_than_its_room_and_none_is_left_out_for_nothing(seed: int) -> None:
    chance = random.Random(seed)
    hosts = [Host(f"h{n}", chance.randint(0, 3000), 0.0) for n in range(3)]
    movers = [Mover(chance.randint(1, 2000), {}) for _ in range(8)]
    places = assign(movers, hosts, seconds, CROWD)
    left = {host.name: host.room for host in hosts}
    for mover, name in zip(movers, places, strict=True):
        if name is not None:
            left[name] -= mover.tokens
    assert min(left.values()) >= 0
    out = [mover.tokens for mover, name in zip(movers, places, strict=True) if name is None]
    assert not out or min(out) > max(left.values())


def test_nobody_and_nowhere() -> None:
    assert assign([], [Host("a", 9, 0.0)], seconds, CROWD) == []
    assert assign([Mover(5, {})], [], seconds, CROWD) == [None]
    assert assign([Mover(5, {})], [Host("a", 4, 0.0)], seconds, CROWD) == [None]
