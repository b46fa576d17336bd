"""Row of a trace, the same for all formats."""

from __future__ import annotations

from dataclasses import dataclass


class TraceError(ValueError):
    """Raised if a trace cannot be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    index: int
    """Place in the file, from 0."""
    arrival: float | None
    """Seconds from the first request, or in some traces from the start of the session; None if
    unknown."""
    input_tokens: int
    """Tokens of the whole prompt; at least 1."""
    output_tokens: int
    """Tokens of the answer; 1 where the trace does not say."""
    session: str | None = None
    """Session that the request is a turn of. ``12.1`` is a sub-agent of session 12."""
    cached_tokens: int | None = None
    """Leading tokens that an unbounded cache would hold; None if that is unknown."""
    think: float | None = None
    """Seconds between the previous answer of the session and this request."""
    blocks: tuple[range, ...] | None = None
    """Ids of the prompt's blocks; blocks with equal ids have equal tokens."""
    block_tokens: int | None = None
    """Tokens in one block, where the format fixes it."""
    turn: int | None = None
    """Number within its session, from 1."""

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that such a cache does not hold; at least 1."""
        return max(1, self.input_tokens - (self.cached_tokens or 0))


def root(session: str) -> str:
    """Return the session that a sub-agent belongs to, or the session itself."""
    return session.partition(".")[0]


def at_least_one(value: object) -> int:
    """Read a count of tokens; 0 is read as 1, because no request has an empty prompt or answer.

    Raises:
        ValueError: the value is no whole number, or negative.
    """
    text = str(value)
    try:
        count = int(text)
    except ValueError:
        number = float(text)  # some writers print counts as 12.0
        if not number.is_integer():
            raise ValueError(f"a count must be a whole number: {text!r}") from None
        count = int(number)
    if count < 0:
        raise ValueError(f"a count must not be negative: {count}")
    return max(count, 1)


def number(cell: str | None) -> float | None:
    """Read the number in a cell; None for an empty or missing one."""
    return float(cell) if cell else None
