"""One request of a trace, and what is wrong with a file that is none."""

from __future__ import annotations

from dataclasses import dataclass


class TraceError(ValueError):
    """The file is not a trace that can be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    index: int
    """Place in the file, from 0."""
    arrival: float | None
    """Seconds from the first request; in some traces from the start of its session."""
    input_tokens: int
    """The whole prompt; at least 1."""
    output_tokens: int
    """The answer; 1 where the trace does not tell."""
    session: str | None = None
    """Turns of one session follow each other. ``12.1`` is a sub-agent of session 12."""
    cached_tokens: int | None = None
    """Leading tokens that a cache without bounds would hold; None is unknown."""
    think: float | None = None
    """Seconds between the answer before it and this request."""
    blocks: tuple[range, ...] | None = None
    """Ids of the prompt's blocks: equal ids are equal tokens."""
    block_tokens: int | None = None
    """Tokens in one block, where the format fixes it."""
    turn: int | None = None
    """Number within its session, from 1."""

    @property
    def new_tokens(self) -> int:
        """What is left to prefill with such a cache; at least 1."""
        return max(1, self.input_tokens - (self.cached_tokens or 0))


def root(session: str) -> str:
    """The session that a sub-agent belongs to, or the session itself."""
    return session.partition(".")[0]


def at_least_one(value: object) -> int:
    """A count of tokens; 0 is read as 1, as no request has an empty prompt or answer.

    Raises:
        ValueError: it is no whole number, or negative.
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
    """A cell's number; None for an empty or missing one."""
    return float(cell) if cell else None
