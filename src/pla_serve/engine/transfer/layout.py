"""Addresses of the KV of a sequence, in this engine and in another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.kv.cache import KVCache

SAMPLES = 64
"""Most values of one weight tensor that go into a fingerprint."""


class Copy(NamedTuple):
    """Bytes to copy from an address in the other engine to one in this engine."""

    local: int
    remote: int
    size: int


class KVSource(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """KV that a reader may copy; the body of `Offer.source`, encoded as MessagePack.

    The engine that offers the KV signs this struct (see `credentials`), so no field can be changed
    on the way to the reader.
    """

    kind: str
    """`KVLayout.kind` of the engine that offers."""
    agent: str
    """Name of that engine in the transport; each life of a process has another name."""
    metadata: bytes
    """Addresses and keys with which the transport connects to that engine."""
    slot: int
    """Address of the offer's slot in the ledger of that engine."""
    generation: int
    """Value that the slot holds as long as the offer stands."""
    tokens: int
    """Number of tokens whose KV is offered, computed already or not."""
    token_hash: bytes
    """`hash_tokens` of these tokens."""
    runs: list[BlockRun]
    """KV blocks in the order of the tokens, as runs of neighbours."""
    blocks: int
    """Number of blocks in the whole KV cache of that engine."""
    keys: list[int]
    """Address of the keys of block 0, one for each layer."""
    values: list[int]
    """Address of the values of block 0, one for each layer."""
    expires: int
    """UNIX time in seconds until which a reader may begin to read."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The paged cache of one engine as addresses."""

    kind: str
    """Text that is equal in engines with the same weights, KV shape, dtype and block size."""
    keys: list[int]
    """Address of the keys of block 0, one for each layer."""
    values: list[int]
    """Address of the values of block 0, one for each layer."""
    block_tokens: int
    token_bytes: int
    """Bytes of one token's keys in one layer; the values take as many."""
    blocks: int
    """Number of blocks in the cache."""

    @classmethod
    def of(cls, cache: KVCache, block_tokens: int, weights: str) -> KVLayout:
        """Describe a cache of blocks with ``block_tokens`` tokens.

        Args:
            weights: `fingerprint` of the model.

        Raises:
            ValueError: the cache is not in the processor's memory.
        """
        shape = cache.shape
        if cache.keys[0].device.type != "cpu":
            raise ValueError(
                "KV transfer reads and writes the processor's memory in this version; "
                f"leave it off on {cache.keys[0].device}"
            )
        kind = (
            f"{shape.layers}x{shape.heads}x{shape.head_dim} {shape.dtype} "
            f"blocks of {block_tokens} weights {weights}"
        )
        return cls(
            kind=kind,
            keys=[memory.data_ptr() for memory in cache.keys],
            values=[memory.data_ptr() for memory in cache.values],
            block_tokens=block_tokens,
            token_bytes=shape.heads * shape.head_dim * shape.dtype.itemsize,
            blocks=cache.slots // block_tokens,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys in one layer."""
        return self.block_tokens * self.token_bytes

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.keys)

    def regions(self) -> list[tuple[int, int]]:
        """Return address and size in bytes of all memory that may be read or written."""
        size = self.blocks * self.block_bytes
        return [(address, size) for address in (*self.keys, *self.values)]

    def copies(
        self, runs: Sequence[BlockRun], source: KVSource, layer: int, start: int, stop: int
    ) -> list[Copy]:
        """Return the copies that bring tokens ``start`` to ``stop`` of a layer into ``runs``."""
        here = _spans(runs, start, stop, self.block_tokens)
        there = _spans(source.runs, start, stop, self.block_tokens)
        size = self.token_bytes
        return [
            Copy(own + mine * size, other + theirs * size, tokens * size)
            for own, other in (
                (self.keys[layer], source.keys[layer]),
                (self.values[layer], source.values[layer]),
            )
            for mine, theirs, tokens in _common(here, there)
        ]


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash over samples of all weights, which differs between models.

    Call it before weights are repacked for a device: repacking changes their order.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(name.encode() + repr(tuple(weight.shape)).encode())
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_tokens(tokens: Sequence[int], cache_scope: str) -> bytes:
    """Return one SHA-256 digest of both the token ids and the cache scope.

    Raises:
        OverflowError: a token id does not fit into 64 bits.
    """
    digest = hashlib.sha256(f"{len(cache_scope)} {cache_scope} {len(tokens)}\n".encode())
    digest.update(np.asarray(tokens, dtype="<i8").tobytes())
    return digest.digest()


def _spans(runs: Iterable[BlockRun], start: int, stop: int, block_tokens: int) -> list[BlockRun]:
    """Return where tokens ``start`` to ``stop`` lie, as token slots (first, end) of the cache."""
    spans: list[BlockRun] = []
    before = 0
    for first, end in runs:
        length = (end - first) * block_tokens
        low, high = max(start - before, 0), min(stop - before, length)
        if low < high:
            spans.append((first * block_tokens + low, first * block_tokens + high))
        before += length
    return spans


def _common(here: list[BlockRun], there: list[BlockRun]) -> list[tuple[int, int, int]]:
    """Cut both lists into pieces without a gap on either side: (slot here, slot there, tokens)."""
    pieces: list[tuple[int, int, int]] = []
    i = j = a = b = 0
    while i < len(here) and j < len(there):
        tokens = min(here[i][1] - here[i][0] - a, there[j][1] - there[j][0] - b)
        pieces.append((here[i][0] + a, there[j][0] + b, tokens))
        a, b = a + tokens, b + tokens
        if a == here[i][1] - here[i][0]:
            i, a = i + 1, 0
        if b == there[j][1] - there[j][0]:
            j, b = j + 1, 0
    return pieces
