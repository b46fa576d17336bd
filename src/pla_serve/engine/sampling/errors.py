"""Errors in the sampling parameters of a request; clients see the messages."""

from __future__ import annotations


class SamplingError(ValueError):
    """The sampling parameters do not fit the model."""


class GrammarError(SamplingError):
    """The grammar is malformed, uses what is not supported, or is too large."""
