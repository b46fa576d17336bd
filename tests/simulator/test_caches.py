from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.simulator.caches import Holders, SimulatedPrefixCache


class SlowCache:
    """Token by token."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: OrderedDict[int, None] = OrderedDict()

    def match(self, prompt: list[range]) -> int:
        count = 0
        for token in (token for run in prompt for token in run):
            if token not in self.tokens:
                break
            count += 1
        return count

    def insert(self, prompt: list[range]) -> None:
        tokens = [token for run in prompt for token in run][: self.capacity]
        for token in reversed(tokens):
            self.tokens[token] = None
            self.tokens.move_to_end(token)
        while len(self.tokens) > self.capacity:
            self.tokens.popitem(last=False)


@st.composite
def prompts(draw: st.DrawFn) -> list[list[range]]:
    """A tree of prompts: each begins as one before it, then goes on with new ids."""
    known: list[list[range]] = [[]]
    fresh = 0
    for _ in range(draw(st.integers(1, 25))):
        parent = draw(st.sampled_from(known))
        keep = draw(st.integers(0, sum(map(len, parent))))
        prompt: list[range] = []
        for run in parent:
            if keep > 0:
                prompt.append(run[:keep])
                keep -= len(run)
        for _ in range(draw(st.integers(0, 2))):
            fresh += draw(st.integers(0, 3))
            length = draw(st.integers(1, 12))
            prompt.append(range(fresh, fresh + length))
            fresh += length
        known.append(prompt)
    return known[1:]


@given(prompts(), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_against_a_list_of_tokens(sequence: list[list[range]], capacity: int) -> None:
    fast, slow = SimulatedPrefixCache(capacity), SlowCache(capacity)
    for prompt in sequence:
        assert fast.match(prompt) == slow.match(prompt)
        fast.insert(prompt)
        slow.insert(prompt)
        assert fast.size == len(slow.tokens) <= capacity
    for prompt in sequence:
        assert fast.match(prompt) == slow.match(prompt)


@given(prompts(), st.lists(st.integers(0, 2), min_size=25, max_size=25))
@settings(deadline=None)
def test_holders_are_those_that_match(sequence: list[list[range]], places: list[int]) -> None:
    caches = {f"i{n}": SimulatedPrefixCache(25) for n in range(3)}
    holders = Holders()
    for prompt, place in zip(sequence, places, strict=False):
        matches = {name: cache.match(prompt) for name, cache in caches.items()}
        assert holders.cached(prompt) == {name: n for name, n in matches.items() if n}
        holders.insert(f"i{place}", caches[f"i{place}"], prompt)


def test_a_cleared_cache_holds_nothing() -> None:
    cache, holders = SimulatedPrefixCache(10), Holders()
    holders.insert("a", cache, [range(5)])
    assert holders.cached([range(9)]) == {"a": 5}
    cache.clear()
    assert holders.cached([range(9)]) == {}
    assert cache.size == 0


def test_capacity() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        SimulatedPrefixCache(-1)
