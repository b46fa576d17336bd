"""What can go wrong before a model serves; every message names the cause and the cure."""

from __future__ import annotations


class LoadingError(Exception):
    """Base of all errors of this package; its text is meant for the user."""


class ModelUnavailable(LoadingError):
    """No source could provide the files of the model, or the files are incomplete."""


class UnsupportedModel(LoadingError):
    """The model is there, but this engine would not compute it right."""
