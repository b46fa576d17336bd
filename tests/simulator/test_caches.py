from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.simulator.caches import SimulatedPrefixCache, TurnCache
from pla_serve.simulator.turns import SimulatedTurn


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


@given(prompts(), st.lists(st.booleans(), min_size=25, max_size=25))
@settings(deadline=None)
def test_a_cache_of_turns_holds_prompts_and_answers(
    sequence: list[list[range]], whole: list[bool]
) -> None:
    turns = [
        SimulatedTurn(n, 0.0, sum(map(len, prompt)), 1, tuple(prompt), answer=(range(999, 1003),))
        for n, prompt in enumerate(sequence)
    ]
    cache, slow = TurnCache(turns, 25), SlowCache(25)
    for turn, with_answer in zip(turns, whole, strict=False):
        assert cache.match(f"{turn.index}~2", turn.prompt_tokens) == slow.match([*turn.prompt])
        (cache.finished if with_answer else cache.prefilled)(str(turn.index))
        slow.insert([*turn.prompt, *turn.answer] if with_answer else [*turn.prompt])


def test_a_turn_that_says_what_is_cached_everywhere_is_believed() -> None:
    turns = [SimulatedTurn(0, 0.0, 9, 1, (range(9),), history=4)]
    assert TurnCache(turns, 0).match("0", 9) == 4


def test_a_cleared_cache_holds_nothing() -> None:
    cache = SimulatedPrefixCache(10)
    cache.insert([range(5)])
    assert cache.match([range(9)]) == 5
    cache.clear()
    assert cache.match([range(9)]) == 0
    assert cache.size == 0


def test_capacity() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        SimulatedPrefixCache(-1)
