"""Triton is interpreted where there is no GPU, and cost profiles are stored for this run alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("triton") is not None:
    import tests.engine.interpreter  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have engines store their cost profiles in a folder of this run, and nothing else there."""
    from pla_serve.engine.loading.cache import cache_root  # it may import Triton: after the above

    root, own = cache_root(), tmp_path_factory.mktemp("cache")
    for name in ("kernels", "models"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(root / name)
    before = os.environ.get("PLA_SERVE_CACHE")
    os.environ["PLA_SERVE_CACHE"] = str(own)
    yield
    if before is None:
        del os.environ["PLA_SERVE_CACHE"]
    else:
        os.environ["PLA_SERVE_CACHE"] = before
