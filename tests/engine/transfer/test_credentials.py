"""Checks of offers by their reader, one by one, and the secret of a fleet."""

from __future__ import annotations

import logging
from uuid import UUID

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.transfer.credentials import (
    CLOCK_SKEW_SECONDS,
    Credentials,
    OfferRefused,
    fleet_secret,
)
from pla_serve.engine.transfer.layout import KVLayout, KVSource, hash_tokens
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE, bind, sign
from tests.engine.tiny import BLOCK
from tests.engine.transfer.world import SECRET

PROMPT = tuple(range(1, 71))

# Offers with a right signature and wrong content, as a faulty version of this program makes them

SHAPE = KVShape(layers=3, heads=2, head_dim=8, dtype=torch.float32)
LAYOUT = KVLayout.of(KVCache(SHAPE, 40 * BLOCK, torch.device("cpu")), BLOCK, "w")
READER = Credentials(SECRET, UUID(int=7), lambda: 1000.0)
GOOD = KVSource(
    kind=LAYOUT.kind,
    agent="p",
    metadata=b"m",
    slot=4096,
    generation=5,
    tokens=len(PROMPT),
    token_hash=hash_tokens(PROMPT, ""),
    runs=[(3, 10), (20, 31)],
    blocks=40,
    keys=LAYOUT.keys,
    values=LAYOUT.values,
    expires=1000,
)
MOST = 2**63 - 1


def check(source: KVSource) -> KVSource:
    offer = bind(sign(SECRET, msgspec.msgpack.encode(source)), READER.reader)
    return READER.check(offer, LAYOUT, PROMPT, "")


def test_a_right_offer_is_taken() -> None:
    assert check(GOOD) == GOOD


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": []},
        {"keys": [], "values": []},
        {"values": LAYOUT.values[:-1]},
        {"keys": [*LAYOUT.keys, 1]},
        {"keys": [-1, 1, 1]},
        {"keys": [MOST] * 3},
        {"runs": []},
        {"runs": [(3, 10), (31, 20)]},
        {"runs": [(-8, 10)]},
        {"runs": [(30, 48)]},
        {"runs": [(3, 10), (20, 30)]},
        {"runs": [(0, 2**62)]},
        {"blocks": 2**62},
        {"blocks": 0},
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": len(PROMPT) + 1},
        {"tokens": 2**62},
        {"tokens": len(PROMPT) - 1},
        {"token_hash": b""},
        {"token_hash": bytes(32)},
        {"slot": 0},
        {"slot": -64},
        {"slot": 2**63},
        {"generation": 0},
        {"generation": -1},
        {"kind": "another model"},
        {"expires": 1000 - CLOCK_SKEW_SECONDS - 1},
    ],
    ids=str,
)
def test_each_number_of_an_offer_is_checked(changes: dict[str, object]) -> None:
    with pytest.raises(OfferRefused):
        check(msgspec.structs.replace(GOOD, **changes))


BODY = msgspec.msgpack.encode(GOOD)


@settings(max_examples=500)
@given(
    st.one_of(
        st.binary(max_size=400),
        st.integers(0, len(BODY)).map(lambda at: BODY[:at]),
        st.tuples(st.integers(0, len(BODY) - 1), st.integers(0, 255)).map(
            lambda change: BODY[: change[0]] + bytes([change[1]]) + BODY[change[0] + 1 :]
        ),
        st.recursive(
            st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.binary(), st.floats()),
            lambda inner: st.lists(inner, max_size=14),
            max_leaves=30,
        ).map(msgspec.msgpack.encode),
    ),
    st.booleans(),
)
def test_any_bytes_are_refused_or_lie_within_the_cache(body: bytes, signed: bool) -> None:
    """Nothing but `OfferRefused` comes out of it, whether or not the sender knows the secret."""
    offer = bind(sign(SECRET, body), READER.reader) if signed else body
    try:
        source = READER.check(offer, LAYOUT, PROMPT, "")
    except OfferRefused:
        return
    assert signed
    runs = [(0, -(-source.tokens // BLOCK))]
    for layer in range(LAYOUT.layers):
        for copy in LAYOUT.copies(runs, source, layer, 0, source.tokens):
            offset = min(
                copy.remote - start
                for start in (source.keys[layer], source.values[layer])
                if copy.remote >= start
            )
            assert offset + copy.size <= source.blocks * LAYOUT.block_bytes


# The secret


def test_a_secret_comes_from_the_environment() -> None:
    assert fleet_secret({FLEET_SECRET_VARIABLE: "s" * 32}) == b"s" * 32


def test_a_short_secret_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="token_hex"):
        fleet_secret({FLEET_SECRET_VARIABLE: "s" * 31})


def test_without_a_secret_nobody_shares_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = fleet_secret({}), fleet_secret({})
    assert first != second
    assert len(first) >= 32
    assert FLEET_SECRET_VARIABLE in caplog.text


def test_a_secret_is_never_shown() -> None:
    assert SECRET.decode() not in repr(READER)
    assert Credentials(SECRET, UUID(int=1)).kind(LAYOUT) == READER.kind(LAYOUT)
    assert Credentials(b"another", UUID(int=7)).kind(LAYOUT) != READER.kind(LAYOUT)
