"""Decoder layers through ``torch.compile``: one compiled layer serves them all, for any length.

Each layer is compiled by itself (regionally), so the boundaries between them stay where the engine
leaves a long prefill. Attention and the write to the KV cache are not part of it: they need the
batch, which is another one each time. What is compiled is everything around them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from pla_serve.engine.attention.interface import set_apart
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.run.graphs.counts import GridCounts

log = logging.getLogger(__name__)

TRIALS = (37, 1)
"""New tokens. One token is compiled on its own, as torch does; all other lengths share what the
first trial compiles. That is an odd number so that no dimension of a model happens to equal it:
torch would take the two for one and the same."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Of the norm of the logits: far above what reordered sums make, far below an error."""

RunBatch = Callable[[Sequence[SpanRequest]], torch.Tensor]
"""The logits (rows, vocabulary) of a batch."""


class CompiledForward:
    """The ``forward`` of a class of layers, compiled; the eager one once compiling has failed.

    Args:
        forward: takes the layer first.
        counts: where failures are counted.
        backend: see ``torch.compile``.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        counts: GridCounts,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self._eager = forward
        self._compiled: Callable[..., Any] | None = torch.compile(
            forward, dynamic=True, backend=backend
        )
        self._counts = counts

    @property
    def compiled(self) -> bool:
        """Whether compiled code is used."""
        return self._compiled is not None

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            return self._eager(layer, *args, **kwargs)
        try:
            return self._compiled(layer, *args, **kwargs)
        except TorchDynamoException as error:
            # Raised before the code in question has run; what ran before it, attention included,
            # writes the same again.
            self.give_up(f"{type(error).__name__}: {error}")
        return self._eager(layer, *args, **kwargs)

    def give_up(self, reason: str) -> None:
        """Use the eager layers from now on."""
        self._compiled = None
        self._counts.compile_failures += 1
        short = " ".join(reason.split())[:300]
        log.warning("decoder layers run as they are, compiling them failed: %s", short)


def compile_layers(
    layers: nn.ModuleList,
    run: RunBatch,
    block_tokens: int,
    counts: GridCounts,
    backend: str | Callable[..., Any] = "inductor",
) -> bool:
    """Compile the layers, now and not when a request comes; whether they are used.

    They are not if they cannot be compiled or give other logits than before; the log says so.

    Args:
        layers: stock ones, of a model loaded with the attention `APART`.
        run: computes a batch with these layers, before anyone has a claim to KV.
    """
    batches = [_batch(tokens, block_tokens) for tokens in TRIALS]
    expected = [run(batch).clone() for batch in batches]
    forwards: dict[type, CompiledForward] = {}
    set_apart()
    for layer in layers:
        kind = type(layer)
        if kind not in forwards:
            forwards[kind] = CompiledForward(kind.forward, counts, backend)
        layer.forward = partial(forwards[kind], layer)
    reason = _differs(run, batches, expected)
    if reason is not None:
        for forward in forwards.values():
            forward.give_up(reason)
    return all(forward.compiled for forward in forwards.values())


def _differs(
    run: RunBatch, batches: Sequence[Sequence[SpanRequest]], expected: Sequence[torch.Tensor]
) -> str | None:
    """Why the results of compiled layers are not to be used, or None."""
    for batch, right in zip(batches, expected, strict=True):
        try:
            got = run(batch)
        except Exception as error:  # compilers, and what they start, fail in many ways
            return f"{type(error).__name__}: {error}"
        difference = float((got.float() - right.float()).norm() / right.float().norm())
        if not difference <= TOLERANCE[right.dtype]:
            return f"the logits differ by {difference:.2g} of their norm"
    return None


def _batch(tokens: int, block_tokens: int) -> list[SpanRequest]:
    """One sequence without history in the first blocks."""
    blocks = -(-tokens // block_tokens)
    return [SpanRequest([i % 61 for i in range(tokens)], 0, [(0, blocks)], True)]
