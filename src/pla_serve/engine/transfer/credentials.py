"""Signed KV offers: an engine signs what it offers, and believes no offer that it cannot verify.

An offer travels through the router, and over links that others may open. `Credentials.sign` fixes
all that a reader relies on: where the KV lies, the tokens and the model that it belongs to, and how
long it may be read. `Credentials.check` verifies the signature before it looks at anything else,
then compares the offer with the request that it came with, and then checks every number. Only
after that is memory touched.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from pla_serve.engine.transfer.layout import KVLayout, KVSource, hash_tokens
from pla_serve.wire import kv_offer
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE, LEAST_SECRET_CHARACTERS
from pla_serve.wire.limits import MOST_LEASE_SECONDS, MOST_OFFER_BYTES

log = logging.getLogger(__name__)

CLOCK_SKEW_SECONDS = 5
"""Difference between the clocks of two machines that is tolerated when an offer expires."""
_MOST_ADDRESS = 2**63 - 1
_CURE = f"set {FLEET_SECRET_VARIABLE} to the same value for all instances that exchange KV"


class OfferRefused(ValueError):
    """An offer cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Signs and checks offers for one engine.

    Args:
        secret: shared by all instances of a fleet.
        life: random; another one in each life of a process.
        unix_time: the time of day in seconds, by which offers expire.
    """

    secret: bytes = field(repr=False)
    life: UUID
    unix_time: Callable[[], float] = time.time

    @property
    def reader(self) -> str:
        """Name of this engine in the transport, to which offers for it must be bound."""
        return f"pla-{self.life}"

    def kind(self, layout: KVLayout) -> str:
        """Return text that is equal in engines that can exchange KV; see `EngineReady.transfer`."""
        return f"{layout.kind} fleet {kv_offer.fleet_name(self.secret)}"

    def expiry(self, seconds: float) -> int:
        """Return the UNIX time of ``seconds`` from now, rounded up."""
        return math.ceil(self.unix_time() + seconds)

    def sign(self, source: KVSource) -> bytes:
        """Return the offer of ``source``; the router binds it to a reader."""
        return kv_offer.sign(self.secret, msgspec.msgpack.encode(source))

    def check(
        self, offer: bytes, layout: KVLayout, prompt: Sequence[int], cache_scope: str
    ) -> KVSource:
        """Return what the offer says, if it is genuine and offers KV of this prompt.

        Args:
            prompt: tokens of the request that the offer came with.
            cache_scope: scope of the prefix cache of this request.

        Raises:
            OfferRefused: it is not genuine, has expired, belongs to another prompt, model or
                reader, or names memory that cannot be right.
        """
        if len(offer) > MOST_OFFER_BYTES:
            raise OfferRefused(f"the KV offer has {len(offer)} bytes, at most {MOST_OFFER_BYTES}")
        try:
            body = kv_offer.verify(offer, self.secret, self.reader)
        except kv_offer.BadSignature:
            raise OfferRefused(
                "the KV offer is not signed with this instance's fleet secret, or is not for this "
                f"instance ({self.reader}); {_CURE}"
            ) from None
        try:
            source = msgspec.msgpack.decode(body, type=KVSource)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise OfferRefused(f"the KV offer is not one of this version: {error}") from None
        if source.kind != layout.kind:
            raise OfferRefused(
                f"the KV offered is of another kind than this instance's ({source.kind}, not "
                f"{layout.kind}); serve the same model with the same settings on both"
            )
        if source.expires + CLOCK_SKEW_SECONDS < self.unix_time():
            raise OfferRefused("the KV offer has expired; are the clocks of the machines right?")
        _check_numbers(source, layout)
        if source.tokens > len(prompt) or source.token_hash != _hash(
            prompt[: source.tokens], cache_scope
        ):
            raise OfferRefused("the KV offered belongs to other tokens than this request has")
        return source


def valid_lease(seconds: float) -> bool:
    """Whether KV may be kept for another engine that long; never for NaN or infinity."""
    return 0 < seconds <= MOST_LEASE_SECONDS


def fleet_secret(environment: Mapping[str, str] = os.environ) -> bytes:
    """Return the secret of the fleet, or a random one, with a warning, if none is given.

    Raises:
        ValueError: the secret given is too short.
    """
    given = environment.get(FLEET_SECRET_VARIABLE, "")
    if not given:
        log.warning(
            "%s is not set, so this instance exchanges KV with nobody; %s",
            FLEET_SECRET_VARIABLE,
            _CURE,
        )
        return os.urandom(32)
    if len(given) < LEAST_SECRET_CHARACTERS:
        raise ValueError(
            f"{FLEET_SECRET_VARIABLE} needs at least {LEAST_SECRET_CHARACTERS} characters; make "
            'one with: python -c "import secrets; print(secrets.token_hex(32))"'
        )
    return given.encode()


def _hash(tokens: Sequence[int], cache_scope: str) -> bytes:
    try:
        return hash_tokens(tokens, cache_scope)
    except (OverflowError, UnicodeEncodeError):
        return b""


def _check_numbers(source: KVSource, layout: KVLayout) -> None:
    """Check that all addresses lie in a cache such as ``layout`` describes.

    Signed offers are made by this program, so that a failure here is a bug of another version.
    """
    room = sum(end - first for first, end in source.runs) * layout.block_tokens
    last = max((*source.keys, *source.values), default=0) + source.blocks * layout.block_bytes
    right = (
        0 < source.tokens <= room
        and all(0 <= first < end <= source.blocks for first, end in source.runs)
        and len(source.keys) == len(source.values) == layout.layers
        and min((*source.keys, *source.values, source.slot, source.generation)) > 0
        and max(last, source.slot, source.generation) <= _MOST_ADDRESS
    )
    if not right:
        raise OfferRefused("the KV offer names memory that no cache of this kind has")
