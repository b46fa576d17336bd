"""Requests that want one token after another, in turn."""

from __future__ import annotations

from collections import OrderedDict

from pla_serve.policy.protocol import Chunk


class DecodePool:
    """Decoding requests; the one stepped least recently goes first, so nobody starves.

    Every operation is O(1) a request that it names.
    """

    def __init__(self) -> None:
        self._ready: OrderedDict[str, Chunk] = OrderedDict()
        self._flying: dict[str, Chunk] = {}
        self._ready_context = 0

    def __len__(self) -> int:
        """Requests ready for a step; those in flight do not count."""
        return len(self._ready)

    @property
    def total(self) -> int:
        """Requests that decode, in flight or not."""
        return len(self._ready) + len(self._flying)

    @property
    def mean_context(self) -> float:
        """Cached tokens of a ready request, on average."""
        return self._ready_context / len(self._ready) if self._ready else 0.0

    def start(self, request_id: str, context: int) -> None:
        """Add a request at the end of the turn; one that is here already starts anew."""
        self.discard(request_id)
        self._ready[request_id] = Chunk(request_id, 1, context)
        self._ready_context += context

    def discard(self, request_id: str) -> None:
        """Forget a request, in flight or not; unknown ids are ignored."""
        chunk = self._ready.pop(request_id, None)
        if chunk is not None:
            self._ready_context -= chunk.history
        self._flying.pop(request_id, None)

    def take(self, places: int) -> list[Chunk]:
        """Hand out the next step of at most ``places`` requests."""
        ready, flying = self._ready, self._flying
        if len(ready) <= places:
            chunks = list(ready.values())
            flying.update(ready)
            ready.clear()
            self._ready_context = 0
            return chunks
        chunks = [ready.popitem(last=False)[1] for _ in range(places)]
        flying.update([(chunk[0], chunk) for chunk in chunks])
        self._ready_context -= sum([chunk[2] for chunk in chunks])
        return chunks

    def settle(self, chunks: tuple[Chunk, ...]) -> None:
        """These steps were computed; requests that were removed meanwhile stay forgotten."""
        ready, flying = self._ready, self._flying
        for chunk in chunks:
            request_id, _, history, _ = chunk
            if flying.get(request_id) == chunk:
                del flying[request_id]
                ready[request_id] = Chunk(request_id, 1, history + 1)
                self._ready_context += history + 1
