"""Who gets KV memory when there is not enough for all."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.sequence import Sequence

PATIENCE_SECONDS = 10.0
"""After this long without memory the first of a class holds back later arrivals of the other."""


@dataclass(slots=True, eq=False)
class _Parked:
    sequence: Sequence
    short: bool
    since: float
    new_tokens: int


class _Place(NamedTuple):
    """Compares in the order in which memory is given; ``order`` breaks all ties."""

    rank: tuple[int, float]
    order: int
    parked: _Parked


class MemoryGate:
    """Reserves KV for prompts, in order of arrival within each class, and parks who must wait.

    A prompt's blocks are reserved as a whole before its first chunk, so a prefill that has begun
    can go on unless someone more entitled takes its memory. Long prompts leave a reserve that only
    short ones may use. A parked prompt is overtaken by later ones of its own class never, by the
    other class for PATIENCE_SECONDS.
    """

    def __init__(self, kv: KVManager, short_reserve: int) -> None:
        self._kv = kv
        self._short_reserve = short_reserve
        self._holders: dict[str, Sequence] = {}
        self._places: dict[str, _Place] = {}
        self._queues: dict[bool, list[_Place]] = {False: [], True: []}
        self._tokens = {False: 0, True: 0}
        self._parks = 0
        self._refused_at: tuple[int, int] | None = None
        """State of the KV in which the first of each class found no memory."""

    def __len__(self) -> int:
        """Sequences that are parked."""
        return len(self._places)

    def backlog(self, short: bool) -> tuple[int, int]:
        """Parked sequences of a class, and the new tokens that they brought."""
        return len(self._queues[short]), self._tokens[short]

    def reserve(self, sequence: Sequence, short: bool, new_tokens: int, now: float) -> bool:
        """Give ``sequence`` blocks for all its tokens, or park it; sets ``computed``.

        ``new_tokens`` are those that it was thought to lack; they are counted while it is parked.
        """
        if self.try_reserve(sequence, short, now):
            return True
        self._parks += 1
        parked = _Parked(sequence, short, now, new_tokens)
        place = _Place(sequence.rank, self._parks, parked)
        self._places[sequence.id] = place
        insort(self._queues[short], place)
        self._tokens[short] += new_tokens
        return False

    def try_reserve(self, sequence: Sequence, short: bool, now: float) -> bool:
        """As ``reserve``, but who finds no memory, or is behind one who waits, is not parked."""
        return not self._blocked(sequence, short, now) and self._take(sequence, short)

    def unpark(self, now: float) -> list[Sequence]:
        """Those that have waited and get their blocks now, most entitled first.

        Cheap to ask again and again: it looks only if memory or the prefix cache has changed.
        """
        if not self._places or self._refused_at == self._kv_state():
            return []
        served: list[Sequence] = []
        refused: set[bool] = set()
        while heads := [q[0] for short, q in self._queues.items() if q and short not in refused]:
            place = min(heads)
            parked = place.parked
            if self._take(parked.sequence, parked.short):
                self._leave(place)
                served.append(parked.sequence)
                continue
            refused.add(parked.short)
            if now - parked.since >= PATIENCE_SECONDS:
                break
        self._refused_at = self._kv_state()
        return served

    def release(self, sequence: Sequence) -> None:
        """It gives up its memory, or its place in the queue for some."""
        place = self._places.get(sequence.id)
        if place is not None:
            self._leave(place)
            self._refused_at = None  # it may have held back others
        if self._holders.pop(sequence.id, None) is not None:
            self._kv.release(sequence.table)

    def victim(self, growing: Sequence) -> Sequence | None:
        """Whose memory to take so that ``growing`` can go on: the least entitled, if less than it.

        Sequences in flight are never chosen. None if ``growing`` has to give way itself.
        """
        others = [s for s in self._holders.values() if not s.in_flight and s is not growing]
        victim = max(others, key=lambda s: s.rank, default=None)
        return victim if victim is not None and victim.rank > growing.rank else None

    def _kv_state(self) -> tuple[int, int]:
        """As long as it is the same, whoever was refused is refused again."""
        return self._kv.version, self._kv.available

    def _leave(self, place: _Place) -> None:
        parked = place.parked
        del self._places[parked.sequence.id]
        queue = self._queues[parked.short]
        del queue[bisect_left(queue, place)]
        self._tokens[parked.short] -= parked.new_tokens

    def _blocked(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Whether the first of a class goes before it."""
        return any(
            queue[0].rank <= sequence.rank
            and (kind == short or now - queue[0].parked.since >= PATIENCE_SECONDS)
            for kind, queue in self._queues.items()
            if queue
        )

    def _take(self, sequence: Sequence, short: bool) -> bool:
        spare = 0 if short else self._short_reserve
        cached = self._kv.reserve(sequence.tokens, sequence.table, spare=spare)
        if cached is None:
            return False
        self._holders[sequence.id] = sequence
        sequence.computed = cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        return True
