"""Requests of a workload with their links: shared prefixes, sessions and clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pla_serve.traces.rows import Row, root

_APART = 1 << 48
"""Distance between the token ids of different kinds of prompts; no kind has so many ids."""


@dataclass(slots=True, eq=False)
class SimulatedTurn:
    """A request with its links. Times are seconds of virtual time."""

    index: int
    """Place in the workload."""
    time: float
    """Arrival in an open loop, unless the turn has to wait for an answer."""
    prompt_tokens: int
    output_tokens: int
    prompt: tuple[range, ...]
    """Tokens of the prompt as ranges of ids, for caches; empty if no prefix is shared."""
    after: int = -1
    """Index of the turn whose answer comes first; -1 for none."""
    think: float = 0.0
    """Seconds between that answer and this turn."""
    history: int | None = None
    """Prompt tokens that are cached on every instance; None: each instance's cache says."""
    answer: tuple[range, ...] = ()
    """Tokens of the answer, where a later turn may begin with them; empty if unknown."""


def turns_of(rows: Sequence[Row], stretch: float = 1.0) -> list[SimulatedTurn]:
    """Make turns of rows that are in order of arrival; ``stretch`` multiplies their arrivals.

    A turn waits for the previous one of its session. Rows with blocks have these as prompts. A row
    without blocks shares as many tokens as it says were cached with the previous prompt and answer
    of its session. The cached tokens of first turns are one prefix that all of them share.
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

    Some traces number their blocks within each session. Such a trace is recognised by a session
    that begins with a block of an earlier session although its row says that nothing was cached.
    Blocks of different sizes come from different traces.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        begun: set[str] = set()
        seen: set[tuple[int, int]] = set()
        self._local: set[int] = set()
        """Sizes of blocks whose ids are numbered within each session."""
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
        """Return the prompt of a row with blocks, without tokens that do not fill a block."""
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
    """Return a prompt that begins as the previous one, or with the common prefix of first turns.

    New tokens get the ids from ``fresh`` on.
    """
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
    """Decides when turns arrive. Both methods return turns with their arrival times."""

    def start(self) -> Iterable[tuple[float, SimulatedTurn]]:
        """Return the turns that wait for no answer, in order of time."""
        ...

    def answered(self, turn: SimulatedTurn, now: float) -> Iterable[tuple[float, SimulatedTurn]]:
        """Return the turns that arrive because this turn's answer is complete."""
        ...


class OpenLoop:
    """Arrivals by the clock. With ``wait``, a later turn of a session also waits for the previous
    answer and then for its think time."""

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
    """A number of clients, each with one request at a time.

    A client plays a session to its end, then takes the next one. Arrival and think times of the
    turns are not used.

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
