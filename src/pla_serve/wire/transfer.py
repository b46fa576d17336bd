"""Messages by which KV moves from one instance to another.

The router asks the source to prefill (`AddRequest.hand_over`) or to lend what it has cached
(`Lend`), gets an `Offer`, gives it to the target in a `Reserve`, and lets the target go on with
`Begin`. `Release` tells the source that its KV is not needed any more.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pla_serve.wire.limits import MOST_OFFER_BYTES, Id, Lease, Name, TokenCount, Tokens
from pla_serve.wire.requests import AddRequest

OfferedKV = Annotated[bytes, Meta(max_length=MOST_OFFER_BYTES)]


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag="reserve"):
    """Take a request over from another instance: reserve its KV here and read what is offered.

    Answered by `Accepted` (``cached_tokens``: what is cached here and will not be moved) or, with
    no memory or no transfer, `Rejected`, at once. Reading starts at once as well; no token is made
    before `Begin`. `AbortRequest` gives it up.
    """

    request: AddRequest
    """As the other instance got it; its ``hand_over`` is ignored."""
    source: OfferedKV
    """``source`` of the other instance's `Offer`, bound with `kv_offer.bind` to this instance's
    `EngineReady.transfer_agent`. Empty to reserve memory and read nothing."""
    lease_seconds: Lease
    """Without `Begin` the reservation ends, with an `Output` of "error", this long after the last
    sign of progress: this message, or another layer read."""

    @property
    def id(self) -> str:
        return self.request.id


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Go on with a reserved request, as an ordinary one: `Output` follows, no ``Accepted`` again.

    KV that could not be read, because the source died or is late, is computed here. The answer to
    an id that is not reserved (its lease is over) is `Rejected`.
    """

    id: Id
    tokens: Tokens
    """Output of the other instance, which the client has got: the first token. Empty if it made
    none (it died, or it only lent a prefix): then the first token is made here."""


class Lend(msgspec.Struct, frozen=True, kw_only=True, tag="lend"):
    """Offer what the prefix cache has of these tokens to another instance; `Offer` is the answer.

    With it a request moves to where there is room: `Lend` here, `Reserve` with the offer there,
    `Begin` without tokens.
    """

    id: Id
    """Id of the request that the KV is for; it runs nowhere on this instance."""
    tokens: Tokens
    lease_seconds: Lease
    cache_scope: Name = ""
    """As `AddRequest.cache_scope`: only KV of this scope is offered."""


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The offer of this id has been read, or is of no use: free its KV. Unknown ids are ignored."""

    id: Id


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """KV that another instance may read from now on, also while it is still being computed.

    Sent once, when the prefill of a request with ``hand_over`` begins, or as answer to `Lend`.
    Send `Reserve` with it to the instance that is to decode, and `Release` here once that
    instance has sent its first `Output`, or ended the request without one.
    """

    id: Id
    source: OfferedKV
    """Signed description of the KV, which only engines read. The router binds it to the target with
    `kv_offer.bind` and sends it on in `Reserve`. Empty if nothing is cached (`Lend` only)."""
    tokens: TokenCount
    """Leading tokens of the prompt that it is, or will be, the KV of."""
