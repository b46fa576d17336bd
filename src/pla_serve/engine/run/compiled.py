"""Runs decoder layers through ``torch.compile``: one compiled layer for all of them and any length.

Each layer is compiled by itself (regional compilation), so the layer boundaries stay, at which the
engine leaves long prefills. Attention and the write to the KV cache are left out, because they
depend on the batch. Everything around them is compiled.
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
"""New tokens of the batches that are compiled for. Torch compiles one token on its own, and all
other lengths share the code of the first trial. Its length is odd so that it equals no dimension of
a model, which torch would take for the same symbol."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest difference of logits, relative to their norm. Reordered sums stay far below it, and
errors are far above."""

RunBatch = Callable[[Sequence[SpanRequest]], torch.Tensor]
"""Computes the logits (rows, vocabulary) of a batch."""


class CompiledForward:
    """Compiled ``forward`` of a class of layers. It falls back to the eager one if compiling fails.

    Args:
        forward: the eager method, which takes the layer as its first argument.
        counts: counter of failures.
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
        """Whether compiled code is in use."""
        return self._compiled is not None

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            return self._eager(layer, *args, **kwargs)
        try:
            return self._compiled(layer, *args, **kwargs)
        except TorchDynamoException as error:
            # The error comes before the failing part has run. The eager layer repeats what ran
            # before it, and writes the same KV again.
            self.give_up(f"{type(error).__name__}: {error}")
        return self._eager(layer, *args, **kwargs)

    def give_up(self, reason: str) -> None:
        """Use the eager layers from now on, and log the reason."""
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
    """Compile decoder layers at start, so that no request waits for the compiler.

    Returns whether compiled layers are in use. They are not if compiling fails or if they give
    other logits than before. The log then says why.

    Args:
        layers: layers of ``transformers``, of a model loaded with the attention `APART`.
        run: computes a batch with these layers. It writes to the first KV blocks.
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
    """Return why the results of compiled layers are not to be trusted, or None if they are."""
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
    """Return a batch of one sequence without history, in the first KV blocks."""
    blocks = -(-tokens // block_tokens)
    return [SpanRequest([i % 61 for i in range(tokens)], 0, [(0, blocks)], True)]
