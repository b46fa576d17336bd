"""Bounds on what one client may take of a server before its request is admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.flags import Flag
from pla_serve.policy.knobs import check_knobs

LIMITS = "Limits of clients"
"""Panel of these flags."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on heads, bodies, connections and silence.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    max_head_bytes: Annotated[
        int,
        Flag(
            "Largest request line and headers; a larger head is refused (431).",
            unit="bytes",
            least=1,
            panel=LIMITS,
        ),
    ] = 64 * 2**10
    head_seconds: Annotated[
        float,
        Flag(
            "A request whose head is not complete by then is refused (408), a silent connection "
            "closed.",
            unit="seconds",
            above=0,
            panel=LIMITS,
        ),
    ] = 10.0
    body_seconds: Annotated[
        float,
        Flag(
            "A request whose body is not complete by then is refused (408).",
            unit="seconds",
            above=0,
            panel=LIMITS,
        ),
    ] = 60.0
    idle_seconds: Annotated[
        float,
        Flag(
            "A connection without a request is closed after this time.",
            unit="seconds",
            above=0,
            panel=LIMITS,
        ),
    ] = 30.0
    max_connections: Annotated[
        int,
        Flag(
            "Most connections; one more takes the place of the one that has waited longest "
            "without a request, or is refused (503) if all have one.",
            least=1,
            panel=LIMITS,
        ),
    ] = 4096
    max_connections_per_address: Annotated[
        int,
        Flag(
            "Most connections from one address, loopback excepted; 0 sets no bound. Behind a "
            "proxy all clients have its address.",
            least=0,
            panel=LIMITS,
        ),
    ] = 2048
    max_upload_bytes: Annotated[
        int,
        Flag(
            "Largest sum of the bodies above 64 KiB that are being read or wait for admission "
            "(503 beyond it). One API key, or one address where there are no keys, takes at most "
            "half of it (429).",
            unit="bytes",
            least=1,
            panel=LIMITS,
        ),
    ] = 64 * 2**20
    max_stored_responses: Annotated[
        int,
        Flag(
            "Answers of /v1/responses that are kept so that clients can continue them. Where there "
            "is no room, the API key that has the most loses the one that it used least recently.",
            least=1,
            panel=LIMITS,
        ),
    ] = 10_000
    max_stored_response_bytes: Annotated[
        int,
        Flag(
            "Largest sum of the answers that are kept, with their conversations; 0 keeps none.",
            unit="bytes",
            least=0,
            panel=LIMITS,
        ),
    ] = 256 * 2**20
    stored_response_seconds: Annotated[
        float,
        Flag(
            "An answer is kept for this long after its last use.",
            unit="seconds",
            above=0,
            panel=LIMITS,
        ),
    ] = 3600.0
    max_background_responses: Annotated[
        int,
        Flag(
            "Answers of /v1/responses that are made in the background at once (429 beyond it). One "
            "API key has at most half of them.",
            least=1,
            panel=LIMITS,
        ),
    ] = 256
    engine_silence_seconds: Annotated[
        float,
        Flag(
            "An engine that gets to no layer boundary for so long is killed and started again.",
            unit="seconds",
            above=0,
            panel=LIMITS,
        ),
    ] = 30.0

    def __post_init__(self) -> None:
        check_knobs(self)
