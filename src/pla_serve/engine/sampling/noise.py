"""Random numbers that depend on (seed, position in the output) and on nothing else.

No generator state exists, so a sequence draws the same numbers whatever shares its batch, on any
device, and after its KV was dropped and recomputed.
"""

from __future__ import annotations

from hashlib import blake2b


def seed_key(seed: int | None, *, default_seed: int, request_id: str) -> bytes:
    """The key of a sequence's random numbers, 16 bytes.

    A request's own ``seed`` alone decides; without one, ``default_seed`` and the request's id do.
    """
    source = f"seed:{seed}" if seed is not None else f"id:{default_seed}:{request_id}"
    return blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """The number in [0, 1) for the output token at ``position``: 53 bits of keyed BLAKE2b."""
    digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53
