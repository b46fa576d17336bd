"""Errors before a model can be served; each message names the cause and the cure."""

from __future__ import annotations


class LoadingError(Exception):
    """Base class of all errors of this package; users see the message."""


class ModelUnavailable(LoadingError):
    """The files of the model cannot be had, or are incomplete."""


class UnsupportedModel(LoadingError):
    """The files are there, but this engine would not compute the model right."""
