"""Requests of a workload with what links them: shared prefixes, sessions, clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pla_serve.traces.rows import Row, root

_APART = 1 << 48
"""More than the token ids of one kind of prompt; keeps the kinds apart."""


@dataclass(slots=True, eq=False)
class SimulatedTurn:
    """One request. Times are seconds of virtual time."""

    index: int
    """Its place in the workload."""
    time: float
    """Arrival in an open loop, if nothing holds it up."""
    prompt_tokens: int
    output_tokens: int
    prompt: tuple[range, ...]
    """The prompt's tokens as ranges of ids, for caches; empty if it shares nothing."""
    after: int = -1
    """The turn whose answer it waits for; -1 for none."""
    think: float = 0.0
    """Seconds between that answer and this turn."""
    history: int | None = None
    """Prompt tokens that are cached wherever it goes; None: those that an instance's cache holds.
    """
    answer: tuple[range, ...] = ()
    """The tokens of its answer, where a later turn may begin with them; empty if unknown."""


def turns_of(rows: Sequence[Row], stretch: float = 1.0) -> list[SimulatedTurn]:
    """Rows in order of arrival as turns; ``stretch`` multiplies arrivals.

    A turn waits for the one before it in its session. Prompts are told apart by their blocks. Where
    there are none, a turn begins like the turn before it in its session and that one's answer, for
    as many tokens as its row says that were cached; the first turns' cached tokens are one prefix
    that all share.
    """
    last: dict[str, SimulatedTurn] = {}
    blocks = _BlockIds(rows)
    fresh = 0
    turns = []
    for index, row in enumerate(rows):
        before = last.get(row.session) if row.session is not None else None
        answer: tuple[range, ...] = ()
        if row.blocks and row.block_tokens:
            prompt = blocks.tokens(row)
        else:
            prompt = _grown(row, before, fresh)
            fresh += row.input_tokens
            if prompt:
                answer = (range(fresh, fresh + row.output_tokens),)
                fresh += row.output_tokens
        turn = SimulatedTurn(
            index,
            (row.arrival or 0.0) * stretch,
            row.input_tokens,
            row.output_tokens,
            prompt,
            -1 if before is None else before.index,
            row.think or 0.0,
            answer=answer,
        )
        if row.session is not None:
            last[row.session] = turn
        turns.append(turn)
    return turns


class _BlockIds:
    """Token ids of blocks.

    Some traces number blocks within each session. That shows where a session begins with a block
    that another had before it, although its row says that nothing was cached. (Blocks of different
    sizes come from different traces.)
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        begun: set[str] = set()
        seen: set[tuple[int, int]] = set()
        self._local: set[int] = set()
        """Sizes of blocks whose ids mean something within one session only."""
        self._sessions: dict[str, int] = {}
        for row in rows:
            if not (row.blocks and row.block_tokens):
                continue
            first = (row.block_tokens, row.blocks[0].start)
            name = None if row.session is None else root(row.session)
            if name is not None and name not in begun:
                begun.add(name)
                self._sessions[name] = len(begun)
                whole = row.input_tokens > row.block_tokens
                if first in seen and whole and row.cached_tokens == 0:
                    self._local.add(row.block_tokens)
            seen.add(first)

    def tokens(self, row: Row) -> tuple[range, ...]:
        """The prompt of a row that has blocks; what does not fill a block is left out."""
        size = row.block_tokens or 1
        offset = _APART * size
        if size in self._local and row.session is not None:
            offset += _APART * 10_000 * self._sessions[root(row.session)]
        left, runs = row.input_tokens, []
        for block in row.blocks or ():
            start = offset + block.start * size
            run = range(start, start + min(len(block) * size, left))
            left -= len(run)
            if run:
                runs.append(run)
        return tuple(runs)


def _grown(row: Row, before: SimulatedTurn | None, fresh: int) -> tuple[range, ...]:
    """The beginning of the turn before, or the common prefix, and new tokens from ``fresh`` on."""
    cached = min(row.cached_tokens or 0, row.input_tokens - 1)
    if row.session is None and not cached:
        return ()
    known = (range(-_APART, -_APART + cached),)
    runs: list[range] = []
    left = cached
    for run in known if before is None else before.prompt + before.answer:
        if left > 0:
            runs.append(run[:left])
            left -= len(runs[-1])
    runs.append(range(fresh, fresh + row.input_tokens - (cached - left)))
    return tuple(runs)


class TurnSource(Protocol):
    """When turns arrive: each method returns turns with the times at which they do."""

    def start(self) -> Iterable[tuple[float, SimulatedTurn]]:
        """Those that wait for nothing, in order of time."""
        ...

    def answered(self, turn: SimulatedTurn, now: float) -> Iterable[tuple[float, SimulatedTurn]]:
        """Those that the end of this turn's answer lets come."""
        ...


class OpenLoop:
    """Arrivals by the clock; a later turn of a session also waits for the answer before it and a
    thought (``wait`` False: it does not)."""

    def __init__(self, turns: Sequence[SimulatedTurn], *, wait: bool = True) -> None:
        self._first = sorted(
            (turn for turn in turns if turn.after < 0 or not wait),
            key=lambda turn: (turn.time, turn.index),
        )
        self._next = {turn.after: turn for turn in turns if turn.after >= 0 and wait}

    def start(self) -> Iterable[tuple[float, SimulatedTurn]]:
        return [(turn.time, turn) for turn in self._first]

    def answered(self, turn: SimulatedTurn, now: float) -> Iterable[tuple[float, SimulatedTurn]]:
        later = self._next.get(turn.index)
        return () if later is None else ((max(later.time, now + later.think), later),)


class ClosedLoop:
    """So many clients, each with one request at a time: a client plays a session to its end, then
    takes the next one. Times and thoughts of the turns are not used.

    Raises:
        ValueError: there is no client.
    """

    def __init__(self, turns: Sequence[SimulatedTurn], clients: int) -> None:
        if clients < 1:
            raise ValueError(f"a closed loop needs at least 1 client, not {clients}")
        self._clients = clients
        self._waiting = deque(turn for turn in turns if turn.after < 0)
        self._next = {turn.after: turn for turn in turns if turn.after >= 0}

    def start(self) -> Iterable[tuple[float, SimulatedTurn]]:
        first = min(self._clients, len(self._waiting))
        return [(0.0, self._waiting.popleft()) for _ in range(first)]

    def answered(self, turn: SimulatedTurn, now: float) -> Iterable[tuple[float, SimulatedTurn]]:
        later = self._next.get(turn.index)
        if later is not None:
            return ((now, later),)
        return ((now, self._waiting.popleft()),) if self._waiting else ()
