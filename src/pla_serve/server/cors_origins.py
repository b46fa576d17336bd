"""Origins of web pages, as ``--cors-origin`` names them."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANY = "*"
ORIGIN = re.compile(r"https?://[^/\s,*]+")


def check_origins(origins: Sequence[str]) -> None:
    """Check the values of ``--cors-origin``.

    Raises:
        ValueError: one is no origin.
    """
    for origin in origins:
        if origin != ANY and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"--cors-origin {origin}: an origin is a scheme and a host, such as "
                "https://chat.example.com or http://localhost:3000, or * for all"
            )
