"""Who gets KV memory when there is not enough for all."""

from __future__ import annotations

from collections.abc import Iterable

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.sequence import Sequence

PATIENCE_SECONDS = 10.0
"""After this long without memory a prompt holds back later arrivals of either class."""


class MemoryGate:
    """Reserves KV for prompts, in order of arrival within each class, and parks who must wait.

    A prompt's blocks are reserved as a whole before its first chunk, so a prefill that has begun
    can always go on. Long prompts leave a reserve that only short ones may use. A parked prompt is
    overtaken by later ones of its own class never, by the other class for PATIENCE_SECONDS.
    """

    def __init__(self, kv: KVManager, short_reserve: int) -> None:
        self._kv = kv
        self._short_reserve = short_reserve
        self._parked: dict[str, tuple[Sequence, bool, float]] = {}

    def __len__(self) -> int:
        """Sequences that are parked."""
        return len(self._parked)

    def reserve(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Give ``sequence`` blocks for all its tokens, or park it; sets ``computed``."""
        if not self._blocked(sequence, short, now) and self._take(sequence, short):
            return True
        self._parked[sequence.id] = (sequence, short, now)
        return False

    def unpark(self, now: float) -> list[Sequence]:
        """Those that have waited and get their blocks now, most entitled first."""
        served: list[Sequence] = []
        refused: set[bool] = set()
        for sequence, short, since in sorted(self._parked.values(), key=lambda p: p[0].rank):
            if short in refused:
                continue
            if self._take(sequence, short):
                del self._parked[sequence.id]
                served.append(sequence)
                continue
            refused.add(short)
            if now - since >= PATIENCE_SECONDS:
                break
        return served

    def forget(self, sequence: Sequence) -> None:
        """It was aborted."""
        self._parked.pop(sequence.id, None)

    def _blocked(self, sequence: Sequence, short: bool, now: float) -> bool:
        return any(
            other.rank <= sequence.rank and (kind == short or now - since >= PATIENCE_SECONDS)
            for other, kind, since in self._parked.values()
        )

    def _take(self, sequence: Sequence, short: bool) -> bool:
        spare = 0 if short else self._short_reserve
        cached = self._kv.reserve(sequence.tokens, sequence.table, spare=spare)
        if cached is None:
            return False
        sequence.computed = cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        return True


def choose_victim(sequences: Iterable[Sequence], growing: Sequence) -> Sequence | None:
    """Whose blocks to take so that ``growing`` can go on: the least entitled, if less than it.

    Sequences in flight are never chosen. None if ``growing`` has to give way itself.
    """
    holders = [s for s in sequences if s.table.blocks and not s.in_flight and s is not growing]
    victim = max(holders, key=lambda s: s.rank, default=None)
    return victim if victim is not None and victim.rank > growing.rank else None
