"""Decides who gets KV blocks when there are not enough for all."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.sequence import Sequence

PATIENCE_SECONDS = 10.0
"""After this long the first parked sequence of a class holds back later ones of the other class."""


@dataclass(slots=True, eq=False)
class _Parked:
    """A sequence that waits for KV blocks."""

    sequence: Sequence
    short: bool
    since: float
    """Time at which it was parked."""
    new_tokens: int


class _Place(NamedTuple):
    """Place of a parked sequence in the queue of its class. Places compare in the queue's order."""

    precedence: tuple[int, float]
    order: int
    """Number of sequences parked before it. It breaks all ties."""
    parked: _Parked


class MemoryGate:
    """Reserves KV blocks for prefills in order of precedence within each class, and parks the rest.

    The blocks of a prefill are reserved as a whole before its first chunk, so that one which has
    begun can go on until a sequence of higher precedence takes its memory. Long prefills leave a
    reserve that only short ones may use.

    A later sequence never overtakes a parked one of its own class. A later sequence of the other
    class may, for PATIENCE_SECONDS. Example: a parked long prefill of 6,000 tokens does not hold up
    shorts that fit into the free blocks, unless they have kept it waiting for 10 s.

    Args:
        short_reserve: blocks that long prefills may not take.
    """

    def __init__(self, kv: KVManager, short_reserve: int) -> None:
        self._kv = kv
        self._short_reserve = short_reserve
        self._holders: dict[str, Sequence] = {}
        """Sequences with KV blocks, by request id."""
        self._places: dict[str, _Place] = {}
        """Places of parked sequences, by request id."""
        self._queues: dict[bool, list[_Place]] = {False: [], True: []}
        """Places of long (False) and short (True) sequences, in order."""
        self._tokens = {False: 0, True: 0}
        """New tokens of the parked sequences of each class."""
        self._tenant_tokens: Counter[str] = Counter()
        """New tokens of the parked sequences of each tenant."""
        self._parks = 0
        self._refused_at: tuple[int, int] | None = None
        """State of the KV memory in which the first of each class found no blocks."""

    def __len__(self) -> int:
        """Return the number of parked sequences."""
        return len(self._places)

    def backlog(self, short: bool) -> tuple[int, int]:
        """Return the number of parked sequences of a class, and their new tokens."""
        return len(self._queues[short]), self._tokens[short]

    def parked_tokens(self, tenant: str) -> int:
        """New tokens that the parked sequences of a tenant brought."""
        return self._tenant_tokens[tenant]

    def reserve(self, sequence: Sequence, short: bool, new_tokens: int, now: float) -> bool:
        """Give ``sequence`` blocks for all its tokens, or park it and return False.

        Sets ``sequence.computed`` to the tokens that the prefix cache provides.

        Args:
            new_tokens: expected new tokens, which count in `backlog` while it is parked.
        """
        if self.try_reserve(sequence, short, now):
            return True
        self._parks += 1
        parked = _Parked(sequence, short, now, new_tokens)
        place = _Place(sequence.precedence, self._parks, parked)
        self._places[sequence.id] = place
        insort(self._queues[short], place)
        self._tokens[short] += new_tokens
        self._tenant_tokens[sequence.request.tenant] += new_tokens
        return False

    def try_reserve(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Give ``sequence`` blocks like `reserve`, but do not park it if there are none."""
        return not self._blocked(sequence, short, now) and self._take(sequence, short)

    def unpark(self, now: float) -> list[Sequence]:
        """Return the parked sequences that get their blocks now, highest precedence first.

        Repeated calls are cheap: nothing is looked at until memory or the prefix cache changes.
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
        """Free the blocks of ``sequence``, or its place in the queue for some."""
        place = self._places.get(sequence.id)
        if place is not None:
            self._leave(place)
            self._refused_at = None  # it may have held back others
        if self._holders.pop(sequence.id, None) is not None:
            self._kv.release(sequence.table)

    def victim(self, growing: Sequence) -> Sequence | None:
        """Return the sequence whose blocks ``growing`` may take for its next token.

        That is the one of lowest precedence among those that no enqueued batch and no transfer
        writes to. None if it does not come after ``growing``, which then has to give way itself.
        """
        others = [s for s in self._holders.values() if not s.in_flight and s is not growing]
        victim = max(others, key=lambda s: s.precedence, default=None)
        if victim is None or victim.precedence <= growing.precedence:
            return None
        return victim

    def _kv_state(self) -> tuple[int, int]:
        """Return a value that changes whenever a refused reservation could succeed."""
        return self._kv.version, self._kv.available

    def _leave(self, place: _Place) -> None:
        """Take a sequence out of its queue."""
        parked = place.parked
        del self._places[parked.sequence.id]
        queue = self._queues[parked.short]
        del queue[bisect_left(queue, place)]
        self._tokens[parked.short] -= parked.new_tokens
        tenant = parked.sequence.request.tenant
        self._tenant_tokens[tenant] -= parked.new_tokens
        if not self._tenant_tokens[tenant]:
            del self._tenant_tokens[tenant]

    def _blocked(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Return whether a parked sequence goes before ``sequence``."""
        return any(
            queue[0].precedence <= sequence.precedence
            and (kind == short or now - queue[0].parked.since >= PATIENCE_SECONDS)
            for kind, queue in self._queues.items()
            if queue
        )

    def _take(self, sequence: Sequence, short: bool) -> bool:
        """Reserve blocks for all tokens of ``sequence``. Returns False if too few are available."""
        spare = 0 if short else self._short_reserve
        cached = self._kv.reserve(
            sequence.tokens, sequence.table, spare=spare, most_cached=sequence.reusable
        )
        if cached is None:
            return False
        self._holders[sequence.id] = sequence
        sequence.computed = cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        return True
