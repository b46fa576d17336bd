"""Questions about stock modules of ``transformers``, before fused ones take their place."""

from __future__ import annotations

from collections.abc import Set

from torch import nn


def rotary_owner(model: nn.Module) -> nn.Module | None:
    """Return the module that holds ``rotary_emb``; None unless exactly one does."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), nn.Module)]
    return owners[0] if len(owners) == 1 else None


def require_children(module: nn.Module, needed: Set[str], allowed: Set[str] = frozenset()) -> None:
    """Check that ``module`` has the submodules ``needed``, and beside them ``allowed`` ones only.

    A submodule that a fused layer does not know could change the result.

    Raises:
        TypeError: a submodule is missing or unknown. The message names those that there are.
    """
    found = {name for name, _ in module.named_children()}
    if not needed <= found <= needed | allowed:
        raise TypeError(f"{type(module).__name__} has the parts {sorted(found)}")
