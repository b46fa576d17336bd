"""Finite prefix caches, one per instance."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from pla_serve.simulator.turns import SimulatedTurn

Prompt = Sequence[range]
"""Tokens as ranges of ids: equal ids are equal tokens after equal tokens."""


class SimulatedPrefixCache:
    """Keeps the KV of prompts; the least recently used tokens go first, from the end of a prompt.

    The same as a least-recently-used list of single tokens in which a prompt is touched from its
    last token to its first, kept as intervals so that a prompt costs steps for its ranges only.

    Args:
        capacity: tokens.

    Raises:
        ValueError: ``capacity`` is negative.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"a cache holds at least 0 tokens, not {capacity}")
        self.capacity = capacity
        self.size = 0
        """Tokens held."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._stamps: list[int] = []
        """When each interval was last used; all disjoint, in order of their ids."""
        self._uses = 0

    def match(self, prompt: Prompt) -> int:
        """Return the number of leading tokens that are held. Does not count as a use."""
        total = 0
        for run in prompt:
            known = self._known(run.start, run.stop)
            total += known
            if known < len(run):
                break
        return total

    def insert(self, prompt: Prompt) -> None:
        """Use a prompt: all of it is held from now on, or as much of its beginning as fits."""
        room, kept = self.capacity, []
        for run in prompt:
            if room <= 0:
                break
            part = run[:room]
            kept.append(part)
            room -= len(part)
        for run in reversed(kept):
            self._uses += 1
            self._write(run.start, run.stop, self._uses)
        while self.size > self.capacity:
            self._evict(self.size - self.capacity)

    def clear(self) -> None:
        """Hold nothing."""
        self._starts.clear()
        self._stops.clear()
        self._stamps.clear()
        self.size = 0

    def _known(self, start: int, stop: int) -> int:
        at, place = start, bisect_right(self._starts, start) - 1
        while 0 <= place < len(self._starts) and self._starts[place] <= at < self._stops[place]:
            at = self._stops[place]
            if at >= stop:
                return stop - start
            place += 1
        return at - start

    def _write(self, start: int, stop: int, stamp: int) -> None:
        """The interval takes the place of whatever it overlaps."""
        low = bisect_right(self._stops, start)
        high = low
        pieces = [(start, stop, stamp)]
        while high < len(self._starts) and self._starts[high] < stop:
            first, last, old = self._starts[high], self._stops[high], self._stamps[high]
            self.size -= min(last, stop) - max(first, start)
            if first < start:
                pieces.insert(0, (first, start, old))
            if last > stop:
                pieces.append((stop, last, old))
            high += 1
        self.size += stop - start
        self._starts[low:high] = [piece[0] for piece in pieces]
        self._stops[low:high] = [piece[1] for piece in pieces]
        self._stamps[low:high] = [piece[2] for piece in pieces]

    def _evict(self, excess: int) -> None:
        """Take up to ``excess`` tokens off the end of the interval that was used longest ago."""
        oldest = min(self._stamps)
        place = len(self._stamps) - 1 - self._stamps[::-1].index(oldest)
        length = self._stops[place] - self._starts[place]
        if length > excess:
            self._stops[place] -= excess
            self.size -= excess
            return
        self.size -= length
        del self._starts[place], self._stops[place], self._stamps[place]


class TurnCache:
    """Prefix cache of one instance that serves turns. Implements `ServerCache`.

    Args:
        turns: all requests, by row.
        capacity: tokens; 0 keeps nothing.
    """

    def __init__(self, turns: Sequence[SimulatedTurn], capacity: int) -> None:
        self._turns = turns
        self._cache = SimulatedPrefixCache(capacity)

    def match(self, id: str, tokens: int) -> int:
        """Tokens that the turn itself says are cached everywhere, or those that are held here."""
        turn = self._turns[row_of(id)]
        return self._cache.match(turn.prompt) if turn.history is None else turn.history

    def prefilled(self, id: str) -> None:
        """Keep the prompt of a turn."""
        if self._cache.capacity:
            self._cache.insert(self._turns[row_of(id)].prompt)

    def finished(self, id: str) -> None:
        """Keep the prompt and the answer of a turn, if its answer is known."""
        turn = self._turns[row_of(id)]
        if turn.answer and self._cache.capacity:
            self._cache.insert((*turn.prompt, *turn.answer))

    def clear(self) -> None:
        """Hold nothing."""
        self._cache.clear()


def row_of(id: str) -> int:
    """The turn that a request is for, by the name that a router gave its attempt."""
    return int(id.partition("~")[0])
