"""Bounds on what one client may take of a server before its request is admitted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on heads, bodies, connections and silence.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    max_head_bytes: int = 64 * 2**10
    """Largest request line and headers; a larger head is refused (431)."""
    head_seconds: float = 10.0
    """A request whose head is not complete by then is refused (408), a silent connection closed."""
    body_seconds: float = 60.0
    """A request whose body is not complete by then is refused (408)."""
    idle_seconds: float = 30.0
    """A connection without a request is closed after this time."""
    max_connections: int = 4096
    """At most this many connections; one more takes the place of the one that has waited longest
    without a request, or is refused (503) if all have one."""
    max_connections_per_address: int = 2048
    """At most this many from one address, loopback excepted; 0 sets no bound. Behind a proxy all
    clients have its address."""
    max_upload_bytes: int = 128 * 2**20
    """Largest sum of all bodies that are being read or wait for admission (503 beyond it). One
    client takes at most half of it."""
    engine_silence_seconds: float = 30.0
    """An engine that gets to no layer boundary for so long is killed and started again."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "max_connections_per_address" else 1e-3
            if not value >= least:
                raise ValueError(f"{field.name} must be at least {least:g}, not {value}")
