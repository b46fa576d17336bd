"""Signatures on KV offers: who made an offer, and which instance may read by it.

All instances of a fleet share a secret. The instance that offers KV signs the offer with it. The
router, which does not know the secret, narrows the signed offer to the one instance that it sends
the offer to. That instance knows the secret, and so can check both steps:

    source:  offer = sign(secret, body)
    router:  bound = bind(offer, "pla-5f0c…")       # the name under which the target reads
    target:  body = verify(bound, secret, "pla-5f0c…")

A signature is an HMAC-SHA256 of 32 bytes behind the body. `bind` replaces it by an HMAC of the
reader's name that is keyed with it, as a macaroon is narrowed by a caveat. Whoever holds a bound
offer can therefore neither widen it nor bind it to another reader.
"""

from __future__ import annotations

import hmac

FLEET_SECRET_VARIABLE = "PLA_SERVE_FLEET_SECRET"
"""Environment variable that gives an instance the secret of its fleet."""
LEAST_SECRET_CHARACTERS = 32
"""A shorter secret could be found by trying."""
SIGNATURE_BYTES = 32
_PURPOSE = b"pla-serve kv offer 1\n"


class BadSignature(ValueError):
    """The offer was not signed with this secret, was changed since, or names another reader."""


def sign(secret: bytes, body: bytes) -> bytes:
    """Return ``body`` followed by its HMAC-SHA256. `bind` then narrows the offer to one reader."""
    return body + _mac(secret, _PURPOSE + body)


def bind(offer: bytes, reader: str) -> bytes:
    """Narrow a signed offer to the reader of this name; any bytes are taken."""
    body, signature = offer[:-SIGNATURE_BYTES], offer[-SIGNATURE_BYTES:]
    return body + _mac(signature, reader.encode())


def verify(offer: bytes, secret: bytes, reader: str) -> bytes:
    """Return the body of an offer that is bound to ``reader``.

    Raises:
        BadSignature: see there; nothing in the offer can be believed.
    """
    body, signature = offer[:-SIGNATURE_BYTES], offer[-SIGNATURE_BYTES:]
    expected = bind(sign(secret, body), reader)[len(body) :]
    if not hmac.compare_digest(signature, expected):
        raise BadSignature("the signature of this KV offer is wrong")
    return body


def fleet_name(secret: bytes) -> str:
    """Text that is equal for equal secrets and does not give the secret away."""
    return _mac(secret, b"pla-serve fleet name 1\n")[:8].hex()


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")
