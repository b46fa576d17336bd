"""Cache scopes: which requests share KV in the prefix cache.

Whether a prompt is cached can be seen in ``cached_tokens`` and in the time to the first token. If
tenants shared the cache, one of them could guess the prompts of another and be told whether the
guess is right. So on a server with several API keys each key has a scope of its own. A client can
divide it further with ``cache_salt``, for example by its own users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pla_serve.server.api.guard import tenant_name


class CacheScopes:
    """Scopes of one server.

    Args:
        api_keys: keys of the server, in the order in which `Keys` counts them.
        shared: whether all keys share one scope; so they do where there is only one key or none.

    Example:

        scopes = CacheScopes(["sk-a", "sk-b"], shared=False)
        scopes.of("key-0", None)        # "8c1f…", another one than that of "key-1"
    """

    def __init__(self, api_keys: Sequence[str], *, shared: bool) -> None:
        # By the key and not by its place in the list: instances behind a router keep their caches
        # while the router is started again with other keys.
        self._tenants: dict[str, bytes] = {}
        if not shared and len(set(api_keys)) > 1:
            self._tenants = {
                tenant_name(place): hashlib.sha256(key.encode()).digest()
                for place, key in enumerate(api_keys)
            }

    def of(self, tenant: str, cache_salt: str | None) -> str:
        """Return the scope of a request (`AddRequest.cache_scope`); empty if all share it.

        Args:
            tenant: as `guard.tenant` returns it.
            cache_salt: as the client gave it.
        """
        key = self._tenants.get(tenant, b"")
        if not key and not cache_salt:
            return ""
        salt = (cache_salt or "").encode("utf-8", "surrogatepass")
        return hashlib.blake2b(salt, key=key, digest_size=16).hexdigest()
