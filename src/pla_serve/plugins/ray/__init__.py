"""PLA-Serve on Ray Serve: an application, and a request router for the applications of others.

    serve run pla_serve.plugins.ray:app model=HuggingFaceTB/SmolLM2-135M-Instruct instances=2

Needs ``ray[serve]``; docs/ray.md says the rest. What decides, `replicas`, `prompts`, `streams` and
`scaling`, does not import Ray.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Import the application when it is asked for, because it needs Ray."""
    if name == "app":
        from pla_serve.plugins.ray.application import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
