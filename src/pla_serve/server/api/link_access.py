"""Who may open a link, and who may read what operators read.

A router on a link may do what no client may: change roles, ask for drains, have KV lent. So a link
has a key of its own, and the API keys of clients do not open it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from pla_serve.server.api.guard import Keys
from pla_serve.server.errors import ApiError
from pla_serve.server.link_key import LINK_KEY_VARIABLE

CURE = f"set {LINK_KEY_VARIABLE} or --link-key-file to the same key on router and instance"
FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
"""Headers by which a proxy says that the peer is not who asks."""


class LinkAccess:
    """Decides which connections may become links.

    With a link key: those that send it. Without one and without API keys: those from this machine.
    Without a link key where there are API keys: none, because nothing tells a router from a client.
    A request of a web page, which has an ``Origin``, is refused in any case.

    Args:
        link_key: None if none is configured.
        api_keys: keys of clients.
    """

    def __init__(self, link_key: str | None, api_keys: Sequence[str] = ()) -> None:
        self._key = None if link_key is None else Keys([link_key])
        self._closed = link_key is None and bool(api_keys)

    def describe(self) -> str:
        """One sentence for the log at the start."""
        if self._key is not None:
            return "Links of routers are open to those with the link key."
        if self._closed:
            return f"Links of routers are closed: there are API keys and no link key; {CURE}."
        return f"Links of routers are open to this machine only: there is no link key; {CURE}."

    def refusal(self, scope: Mapping[str, Any]) -> ApiError | None:
        """The answer to a connection that may not become a link, or None for one that may."""
        headers = dict(scope["headers"])
        if b"origin" in headers:
            return _forbidden("links are for routers, not for web pages (Origin)")
        if self._key is not None:
            if self._key.admit(headers.get(b"authorization")) is None:
                return ApiError(401, f"wrong or missing link key: {CURE}", code="invalid_link_key")
            return None
        if self._closed:
            return _forbidden(f"this instance has API keys and no link key: {CURE}")
        if any(name in headers for name in FORWARDED) or not is_local(scope.get("client")):
            return _forbidden(f"without a link key, links are for this machine only: {CURE}")
        return None


def operator_keys(link_key: str | None, api_keys: Sequence[str]) -> Keys | None:
    """Keys for ``/metrics`` and ``/fleet/instance``; None where clients need no key either."""
    if not api_keys:
        return None
    return Keys([*api_keys, *([] if link_key is None else [link_key])])


def is_local(client: Sequence[Any] | None) -> bool:
    """Whether the peer of a connection is on this machine; a Unix socket has no address."""
    if client is None:
        return True
    try:
        address = ipaddress.ip_address(str(client[0]))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="link_refused")
