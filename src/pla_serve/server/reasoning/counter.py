"""Counts the tokens of an answer that are reasoning."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from pla_serve.server.reasoning.formats import Beginning, ReasoningFormat


class ReasoningCounter:
    """Counts token by token, so how tokens arrive makes no difference. Markers do not count.

    Args:
        form: the markers.
        beginning: how the answer begins.
        bytes_of: bytes of a token.
        calls: markers of calls that end the reasoning.

    Attributes:
        count: tokens so far.
    """

    def __init__(
        self,
        form: ReasoningFormat,
        beginning: Beginning,
        bytes_of: Callable[[int], bytes],
        calls: tuple[str, ...] = (),
    ) -> None:
        self.count = 0
        self._opens = [marker.encode() for marker in form.opens]
        self._closes = [marker.encode() for marker in (*form.closes, *calls)]
        self._keep = max(map(len, [*self._opens, *self._closes]), default=1) - 1
        self._repeats = form.repeats
        self._bytes_of = bytes_of
        self._reasons = beginning is Beginning.REASONING
        self._waits = beginning is Beginning.EITHER or form.repeats
        self._tail = b""
        self._sizes: deque[int] = deque()
        """Sizes of the tokens that end the tail."""

    def push(self, tokens: Iterable[int]) -> None:
        """Count the next tokens of the answer."""
        for token in tokens:
            if self._reasons:
                self._inside(self._bytes_of(token))
            elif self._waits:
                self._outside(self._bytes_of(token))

    def _inside(self, raw: bytes) -> None:
        self.count += 1
        self._tail += raw
        self._sizes.append(len(raw))
        place = _first(self._tail, self._closes)
        if place is not None:
            start = len(self._tail)
            while self._sizes and (start := start - self._sizes.pop()) >= place:
                self.count -= 1
            self._reasons, self._waits = False, self._repeats
            self._forget()
            return
        while self._sizes and len(self._tail) - self._sizes[0] >= self._keep:
            self._tail = self._tail[self._sizes.popleft() :]

    def _outside(self, raw: bytes) -> None:
        self._tail += raw
        if not self._repeats:
            # White space does not add up: an answer may be nothing else for 100,000 tokens.
            self._tail = text = self._tail.lstrip()
            if not any(marker.startswith(text[: len(marker)]) for marker in self._opens):
                self._waits = False
        if _first(self._tail, self._opens) is not None:
            self._reasons = True
            self._forget()
        elif self._repeats:
            self._tail = self._tail[-self._keep :]

    def _forget(self) -> None:
        self._tail = b""
        self._sizes.clear()


def _first(text: bytes, markers: Sequence[bytes]) -> int | None:
    """Return where the first of ``markers`` stands in ``text``."""
    return min((place for m in markers if (place := text.find(m)) >= 0), default=None)
