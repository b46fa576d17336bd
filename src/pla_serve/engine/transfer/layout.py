"""Where the KV of a run of tokens lies in memory, here and in another engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch

from pla_serve.engine.attention.cache import KVCache
from pla_serve.engine.kv.blocks import BlockRun

SAMPLES = 64
"""Values of each weight tensor that go into a fingerprint."""


class Copy(NamedTuple):
    """Bytes to fetch: from an address in the other engine to one here."""

    local: int
    remote: int
    size: int


class KVSource(msgspec.Struct, frozen=True, array_like=True):
    """What a reader has to know of an offer; `Offer.source` is this in MessagePack."""

    kind: str
    """`KVLayout.kind` of who offers."""
    agent: str
    """Its name in the transport, another one in each life of its process."""
    metadata: bytes
    """What the transport needs to reach it."""
    slot: int
    """Address of the offer's slot in its ledger."""
    generation: int
    """What that slot holds as long as the offer stands."""
    tokens: int
    """Tokens whose KV is, or will be, there."""
    runs: list[BlockRun]
    """Its blocks, in the order of the tokens."""
    keys: list[int]
    """Address of the keys of block 0, by layer."""
    values: list[int]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The paged cache of one engine as addresses."""

    kind: str
    """Equal for engines whose KV means the same: weights, shape, dtype and block size."""
    keys: list[int]
    """Address of the keys of block 0, by layer."""
    values: list[int]
    block_tokens: int
    token_bytes: int
    """Bytes of one token's keys in one layer; its values take as many."""
    blocks: int

    @classmethod
    def of(cls, cache: KVCache, block_tokens: int, weights: str) -> KVLayout:
        """``weights`` is a `fingerprint`.

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
    def layers(self) -> int:
        return len(self.keys)

    def regions(self) -> list[tuple[int, int]]:
        """Address and bytes of all memory that may be read or written."""
        size = self.blocks * self.block_tokens * self.token_bytes
        return [(address, size) for address in (*self.keys, *self.values)]

    def copies(
        self, runs: Sequence[BlockRun], source: KVSource, layer: int, start: int, stop: int
    ) -> list[Copy]:
        """What to fetch for tokens ``start`` to ``stop`` of a layer, into these runs of blocks."""
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
    """Tells models apart by samples of their weights, before any of them is repacked."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        digest.update(name.encode() + repr(tuple(weight.shape)).encode())
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spans(runs: Iterable[BlockRun], start: int, stop: int, block_tokens: int) -> list[BlockRun]:
    """Token slots (first, end) of tokens ``start`` to ``stop`` of what lies in these runs."""
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
    """Pieces that have no gap on either side, as (slot here, slot there, tokens)."""
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
