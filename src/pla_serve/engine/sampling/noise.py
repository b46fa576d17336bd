"""Random numbers that depend on a seed and a position in the output only.

There is no state of a generator. So a sequence gets the same numbers in any batch, on any device,
and after its KV was dropped and computed again.
"""

from __future__ import annotations

from hashlib import blake2b


def seed_key(seed: int | None, *, default_seed: int, request_id: str) -> bytes:
    """Return the 16-byte key of a sequence's random numbers.

    The key follows from ``seed`` alone, or without one from ``default_seed`` and the request's id.
    """
    source = f"seed:{seed}" if seed is not None else f"id:{default_seed}:{request_id}"
    return blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """Return the number in [0, 1) for the output token at ``position``: 53 bits of BLAKE2b."""
    digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53
