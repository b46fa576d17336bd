"""Circuit breaker: keeps requests away from an instance that fails again and again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pla_serve.flags import Flag

FAULTS = "Faults"
"""Panel of the flags about instances that fail."""


@dataclass(frozen=True, slots=True)
class CircuitOptions:
    """Settings of the circuit breaker of each instance.

    Raises:
        ValueError: a field is out of range.
    """

    failures: Annotated[
        int,
        Flag(
            "Failures in a row after which an instance gets no requests for a while.",
            panel=FAULTS,
            name="--circuit-failures",
        ),
    ] = 3
    open_seconds: Annotated[
        float,
        Flag(
            "How long that while is at first; each failed probe doubles it, up to a minute.",
            unit="seconds",
            panel=FAULTS,
            name="--circuit-seconds",
        ),
    ] = 2.0
    most_open_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ValueError(f"a circuit opens after at least 1 failure, not {self.failures}")
        if not 0 < self.open_seconds <= self.most_open_seconds:
            raise ValueError(
                f"a circuit stays open for a positive time of at most {self.most_open_seconds} s, "
                f"not {self.open_seconds}"
            )


class CircuitState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    """One request is sent as a probe; its result closes the circuit or opens it again."""


class Circuit:
    """Circuit breaker of one instance. Times are seconds on a clock that never goes back.

    Each request counts once: as a success or as a failure, whichever shows first.
    """

    def __init__(self, options: CircuitOptions) -> None:
        self._options = options
        self._failures = 0
        self._opened = 0
        """Number of times that the circuit has opened since it was last closed."""
        self._until: float | None = None
        """Time until which the circuit stays open; None while it is closed."""
        self._probe: str | None = None

    @property
    def closed(self) -> bool:
        return self._until is None

    def state(self, now: float) -> CircuitState:
        if self._until is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self._until else CircuitState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may be sent to the instance."""
        return self._until is None or (now >= self._until and self._probe is None)

    def sent(self, id: str) -> None:
        """Note that a request is sent; in a circuit that is not closed it is the probe."""
        if self._until is not None and self._probe is None:
            self._probe = id

    def withdrawn(self, id: str) -> None:
        """Note that nothing will be learnt of a request; another one may be the probe."""
        if self._probe == id:
            self._probe = None

    def succeeded(self) -> bool:
        """Close the circuit, and return whether it was open."""
        was_open = self._until is not None
        self._failures = self._opened = 0
        self._until = self._probe = None
        return was_open

    def failed(self, now: float) -> None:
        self._failures += 1
        self._probe = None
        if self._until is not None or self._failures >= self._options.failures:
            seconds = self._options.open_seconds * 2.0 ** min(self._opened, 30)
            self._until = now + min(seconds, self._options.most_open_seconds)
            self._opened += 1
