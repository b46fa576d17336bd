"""Whether NIXL is there, without the time that importing it takes."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = ("nixl_cu13", "nixl_cu12")
"""One build for each CUDA version; either moves the processor's memory."""
CURE = 'install it with: pip install "pla-serve[transfer]"'


def installed_module() -> str | None:
    """The build that is used."""
    return next((name for name in MODULES if find_spec(name) is not None), None)
