"""Errors in the sampling parameters of a request; clients see the messages."""

from __future__ import annotations

import torch

from pla_serve.grammar.errors import GrammarError

__all__ = ["NOT_OF_ONE_REQUEST", "GrammarError", "SamplingError"]

NOT_OF_ONE_REQUEST = (torch.AcceleratorError,)
"""Exceptions after which the device computes nothing any more, for whomever."""


class SamplingError(ValueError):
    """The sampling parameters do not fit the model."""
