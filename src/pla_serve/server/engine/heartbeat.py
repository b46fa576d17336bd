"""Tells an engine that hangs from one that works on something long."""

from __future__ import annotations

from math import ceil

BEAT_SECONDS = 1.0
"""Time between two looks at the engine."""


class Heartbeat:
    """Counts the beats at which a ready engine had said nothing since the one before.

    Time is counted in beats and not on a clock: while this process itself is held or the machine
    sleeps there are no beats, so the engine is not blamed for it.

    Args:
        silence_seconds: how long a working engine may say nothing: more than any of its layers, or
            its sampling, takes.
    """

    def __init__(self, silence_seconds: float, beat_seconds: float = BEAT_SECONDS) -> None:
        self._most = max(2, ceil(silence_seconds / beat_seconds))
        self._silent = 0

    def heard(self) -> None:
        """The engine has sent something."""
        self._silent = 0

    def beat(self) -> bool:
        """Time has passed: True once the engine has been silent for too long."""
        self._silent += 1
        return self._silent > self._most
