"""Errors in the sampling parameters of a request; clients see the messages."""

from __future__ import annotations

from pla_serve.grammar.errors import GrammarError

__all__ = ["GrammarError", "SamplingError"]


class SamplingError(ValueError):
    """The sampling parameters do not fit the model."""
