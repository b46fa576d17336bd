"""Errors of libraries and compilers, which may raise anything on a device they do not support."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error, for a log.

    Example: ``RuntimeError: Failed to find C compiler.``
    """
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
