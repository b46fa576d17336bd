"""Owners of files and batches: names of API keys that outlive the order of ``--api-key``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pla_serve.server.api.guard import tenant_name

EVERYBODY = "everybody"
"""Owner of all files where the server has no keys."""


class Owners:
    """Names an owner for each tenant. The name follows from the key and does not show it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._owners = {tenant_name(place): _digest(key) for place, key in enumerate(keys)}
        self._keys: dict[str, str | None] = {_digest(key): key for key in keys}
        if not keys:
            self._owners, self._keys = {"": EVERYBODY}, {EVERYBODY: None}

    def of(self, tenant: str) -> str:
        """Return the owner that a tenant of this server is."""
        return self._owners[tenant]

    def __contains__(self, owner: str) -> bool:
        """Whether the owner's key is one of this server now."""
        return owner in self._keys

    def key(self, owner: str) -> str | None:
        """Return the owner's API key; None on a server without keys."""
        return self._keys[owner]


def _digest(key: str) -> str:
    return hashlib.sha256(b"owner of offline batches\0" + key.encode()).hexdigest()[:32]
