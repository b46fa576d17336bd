r"""Regular expressions whose ``\d``, ``\w`` and ``\s`` mean ASCII.

The grammar library reads them as classes of Unicode, so that ``\d{4}`` would allow mathematical
digits. In the ``pattern`` of a JSON schema, and in vLLM, they are ASCII.
"""

from __future__ import annotations

import re

CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v"}
_PARTS = re.compile(r"\\(.)|\[\^?\]?|\]", re.DOTALL)


def with_ascii_classes(regex: str) -> str:
    r"""Return the same expression with ranges of ASCII characters in the place of classes.

    >>> with_ascii_classes(r"\d+[\w-]")
    '[0-9]+[A-Za-z0-9_-]'
    >>> with_ascii_classes(r"\D[^\s\D]")
    '[^0-9][^ \\t\\n\\r\\f\\v[^0-9]]'
    """
    depth = 0

    def write(found: re.Match[str]) -> str:
        nonlocal depth
        part, escaped = found[0], found[1]
        if escaped is None:
            depth = max(0, depth - 1) if part == "]" else depth + 1
            return part
        ranges = CLASSES.get(escaped.lower())
        if ranges is None:
            return part
        if escaped.isupper():
            return f"[^{ranges}]"
        return ranges if depth else f"[{ranges}]"

    return _PARTS.sub(write, regex)
