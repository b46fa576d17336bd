"""Checks of the layers of ``transformers`` that fused ones take the place of."""

from __future__ import annotations

from collections.abc import Set

from torch import nn


def require_children(module: nn.Module, needed: Set[str], allowed: Set[str] = frozenset()) -> None:
    """Check that ``module`` has the submodules ``needed``, and beside them ``allowed`` ones only.

    A submodule that a fused layer does not know could change the result.

    Raises:
        TypeError: a submodule is missing or unknown. The message names those that there are.
    """
    found = {name for name, _ in module.named_children()}
    if not needed <= found <= needed | allowed:
        raise TypeError(f"{type(module).__name__} has the parts {sorted(found)}")
