"""Signatures on KV offers: only the bytes that were signed, and only for the reader named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.wire.kv_offer import BadSignature, bind, fleet_name, sign, verify

SECRET = b"a secret of the whole fleet"


@given(st.binary(), st.text())
def test_a_bound_offer_is_verified_by_its_reader(body: bytes, reader: str) -> None:
    assert verify(bind(sign(SECRET, body), reader), SECRET, reader) == body


@given(st.binary(min_size=1), st.data())
def test_any_other_bytes_are_refused(body: bytes, data: st.DataObject) -> None:
    good = bind(sign(SECRET, body), "d")
    at = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = data.draw(
        st.sampled_from(
            (
                good[:at],
                good[at + 1 :],
                good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :],
                good + b"\0",
                b"\0" + good,
            )
        )
    )
    with pytest.raises(BadSignature):
        verify(changed, SECRET, "d")


@pytest.mark.parametrize(
    "offer",
    [
        sign(SECRET, b"body"),
        bind(sign(SECRET, b"body"), "e"),
        bind(bind(sign(SECRET, b"body"), "e"), "d"),
        bind(bind(sign(SECRET, b"body"), "d"), "d"),
        bind(sign(b"another secret", b"body"), "d"),
    ],
    ids=["unbound", "another reader", "bound anew", "bound twice", "another fleet"],
)
def test_only_the_reader_named_takes_it(offer: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(offer, SECRET, "d")


def test_the_name_of_a_fleet_follows_from_its_secret_alone() -> None:
    assert fleet_name(SECRET) == fleet_name(bytes(SECRET))
    assert fleet_name(SECRET) != fleet_name(SECRET + b"x")
    assert SECRET not in fleet_name(SECRET).encode()
