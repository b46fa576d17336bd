"""Kinds of servers that can stand behind a router, by the scheme of their URL.

``http://10.0.0.1:8000`` is an instance of ours, ``vllm+http://10.0.0.2:8000`` a vLLM server. A new
kind is one line in `KINDS`, and a `Dialect` or a `Link` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pla_serve.fleet.link import http, own, protocol
from pla_serve.fleet.link.dialect import Dialect
from pla_serve.fleet.link.protocol import Link, LinkEvents
from pla_serve.fleet.link.sglang import SglangDialect
from pla_serve.fleet.link.vllm import VllmDialect

OWN = "pla"
"""Kind of an instance of ours; its URL names no kind."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A kind of server."""

    make: Callable[[str, LinkEvents, str | None, float], Link]
    """Makes a link from a URL, a receiver of its events, an API key, and the seconds of silence
    after which the server counts as lost."""
    liveness_seconds: float
    """Default of these seconds of silence."""


def _own_link(url: str, events: LinkEvents, api_key: str | None, liveness: float) -> Link:
    return own.InstanceLink(url, events, api_key=api_key, liveness_seconds=liveness)


def _speaking(dialect: Callable[[], Dialect]) -> ServerKind:
    def make(url: str, events: LinkEvents, api_key: str | None, liveness: float) -> Link:
        times = http.HttpLinkTimes(liveness=liveness)
        return http.HttpLink(url, events, dialect(), api_key=api_key, times=times)

    return ServerKind(make, http.LIVENESS_SECONDS)


KINDS: Mapping[str, ServerKind] = MappingProxyType(
    {
        OWN: ServerKind(_own_link, protocol.LIVENESS_SECONDS),
        "vllm": _speaking(VllmDialect),
        "sglang": _speaking(SglangDialect),
    }
)


def url_forms() -> str:
    """Return the forms of an instance's URL, one for each kind of server, for messages and help."""
    forms = ["http://HOST:PORT" if kind == OWN else f"{kind}+http://HOST:PORT" for kind in KINDS]
    return ", ".join(forms[:-1]) + " or " + forms[-1]


def split_url(url: str) -> tuple[str, str]:
    """Return the kind of a server and its address without the kind.

    >>> split_url("vllm+http://10.0.0.2:8000/")
    ('vllm', 'http://10.0.0.2:8000')
    """
    scheme, separator, rest = url.rstrip("/").partition("://")
    kind, plus, scheme_behind = scheme.partition("+")
    return (kind, f"{scheme_behind}://{rest}") if plus else (OWN, f"{scheme}{separator}{rest}")


def check_urls(urls: Sequence[str]) -> None:
    """Check that each URL is that of a known kind of server, and that none is there twice.

    Raises:
        ValueError: one is not; the message says what URLs look like.
    """
    for url in urls:
        kind, address = split_url(url)
        if kind not in KINDS or not address.startswith(("http://", "https://")):
            raise ValueError(f"an instance is {url_forms()}, not {url!r}")
    addresses = [split_url(url)[1] for url in urls]
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"the instance {address} was named twice; name it once")


def check_own(urls: Sequence[str]) -> None:
    """Check that each URL is that of an instance of ours.

    Raises:
        ValueError: one is not.
    """
    for url in urls:
        kind = split_url(url)[0]
        if kind != OWN:
            raise ValueError(
                f"--picker-port is for instances of ours, which report their queues; {url} is "
                f"a server of kind {kind}: route to it without --picker-port"
            )


def link_maker(
    url: str,
    api_key: str | None,
    liveness_seconds: float | None,
    link_key: str | None = None,
) -> Callable[[LinkEvents], Link]:
    """Return a function that makes the link to ``url``, given the receiver of its events.

    Args:
        url: one that `check_urls` accepts.
        api_key: key that servers of other kinds ask for; instances of ours are sent it if there
            is no link key.
        link_key: key of links to instances of ours.
        liveness_seconds: silence after which the server counts as lost; None: by its kind.
    """
    name, address = split_url(url)
    kind = KINDS[name]
    liveness = kind.liveness_seconds if liveness_seconds is None else liveness_seconds
    key = link_key if name == OWN and link_key is not None else api_key
    return lambda events: kind.make(address, events, key, liveness)
