"""Body of ``POST /v1/batches``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pla_serve.server.api.strict import Strict

MOST_WINDOW = 30 * 86_400
"""Longest completion window, in seconds."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def window_seconds(window: str) -> int:
    """Return the seconds of a completion window.

    >>> window_seconds("24h")
    86400

    Raises:
        ValueError: it is none, or not between one second and 30 days.
    """
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", window)
    seconds = int(found[1]) * UNITS[found[2]] if found else 0
    if not 1 <= seconds <= MOST_WINDOW:
        raise ValueError("a whole number with s, m, h or d behind it, from 1s to 30d, as in 24h")
    return seconds


def _checked_window(window: str) -> str:
    window_seconds(window)
    return window


class BatchRequest(Strict):
    """What a client asks for."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=100)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    completion_window: Annotated[str, Field(max_length=20), AfterValidator(_checked_window)]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
