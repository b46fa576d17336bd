"""Finds out whether NIXL is installed without importing it, which takes seconds."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = ("nixl_cu13", "nixl_cu12")
"""NIXL's builds for CUDA 13 and CUDA 12; both copy memory of the processor."""
CURE = 'install it with: pip install "pla-serve[transfer]"'


def installed_module() -> str | None:
    """Return the module of the build that is used; None if NIXL is not installed."""
    return next((name for name in MODULES if find_spec(name) is not None), None)
