"""Faults of a grammar; the messages are meant for the client."""

from __future__ import annotations


class GrammarError(ValueError):
    """The grammar is malformed, uses what is not supported, or passes a limit."""
