"""Runs the model over a flat batch; the pass can be left at any layer boundary and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pla_serve.engine.attention.cache import KVCache
from pla_serve.engine.attention.interface import AttentionBackend, ForwardContext
from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.run.device import RunAhead

AtBoundary = Callable[[], None]
"""Called before each decoder layer. May run other batches; raising abandons the pass."""


class ModelRunner:
    """A model, its decoder layers in order, and its KV cache.

    Forward passes nest: ``at_boundary`` of one may call ``forward`` again, and the outer pass
    continues with its activations as they were. Nothing here knows why.

    ``run_ahead`` bounds how far the host gets ahead of the device in passes with boundaries.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        cache: KVCache,
        backend: AttentionBackend,
        run_ahead: RunAhead | None = None,
    ) -> None:
        self._model = model
        self._run_ahead = run_ahead
        self._cache = cache
        self._backend = backend
        self._at_boundary: AtBoundary | None = None
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)

    @torch.inference_mode()
    def forward(self, batch: FlatBatch, at_boundary: AtBoundary | None = None) -> torch.Tensor:
        """Logits (rows, vocabulary) of ``batch.outputs``; writes the KV of all tokens.

        What ``at_boundary`` raises comes out of here; KV of finished layers is then written.
        """
        context = ForwardContext(batch, self._cache, self._backend)
        with self._boundary(at_boundary):
            result = self._model(
                input_ids=batch.tokens.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=batch.outputs,
                forward_context=context,
            )
        logits: torch.Tensor = result.logits
        return logits[0]

    @contextmanager
    def _boundary(self, at_boundary: AtBoundary | None) -> Iterator[None]:
        outer, self._at_boundary = self._at_boundary, at_boundary
        try:
            yield
        finally:
            self._at_boundary = outer

    def _before_layer(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self._at_boundary is None:
            return
        if self._run_ahead is None:
            self._at_boundary()
        else:
            self._run_ahead.before_layer(self._at_boundary)
