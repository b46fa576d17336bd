"""Kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("triton") is not None:
    import tests.engine.interpreter  # noqa: F401
