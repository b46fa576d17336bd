"""Runs the model over a flat batch. At each layer boundary the pass can be left or resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pla_serve.engine.attention.interface import AttentionBackend, ForwardContext
from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.device.run_ahead import RunAhead
from pla_serve.engine.kv.cache import KVCache
from pla_serve.engine.run.head import ModelHead

AtBoundary = Callable[[], None]
"""Called before each decoder layer. It may run other batches. An exception leaves the pass."""


class PassAbandoned(Exception):
    """Raised at a layer boundary to leave a forward pass whose result nobody wants any more."""


class ModelRunner:
    """Runs forward passes of one model over its KV cache.

    Passes nest: ``at_boundary`` of a pass may call `forward` for another batch. The outer pass
    keeps its activations on the Python stack, and goes on with them afterwards. Example, in which
    batch ``short`` runs before the second layer of batch ``long``::

        boundaries = iter([None, short, None])

        def at_boundary():
            batch = next(boundaries)
            if batch is not None:
                runner.forward(batch)

        logits = runner.forward(long, at_boundary)  # of a model with three layers

    Args:
        layers: decoder layers of ``model``, in order. Each gets a hook that calls ``at_boundary``.
        run_ahead: bounds how far the host gets ahead of the device in passes with boundaries.
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
        self._head = ModelHead(model)
        self._run_ahead = run_ahead
        self._cache = cache
        self._backend = backend
        self._at_boundary: AtBoundary | None = None
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)

    @torch.inference_mode()
    def forward(self, batch: FlatBatch, at_boundary: AtBoundary | None = None) -> torch.Tensor:
        """Write the KV of all tokens, and return logits (rows, vocabulary) of ``batch.outputs``.

        An exception of ``at_boundary`` leaves the pass. Layers before it have written their KV.
        """
        self._cache.note_use(batch.slots)
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

    @torch.inference_mode()
    def hidden(self, batch: FlatBatch, at_boundary: AtBoundary) -> torch.Tensor:
        """Write the KV of all tokens like `forward`; return their last hidden states.

        Returns (tokens, hidden size), for `logits`.
        """
        self._cache.note_use(batch.slots)
        context = ForwardContext(batch, self._cache, self._backend, every_state=True)
        with self._boundary(at_boundary):
            result = self._head.decoder(
                input_ids=batch.tokens.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                forward_context=context,
            )
        states: torch.Tensor = result.last_hidden_state
        return states[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, vocabulary) of some of the rows of `hidden`."""
        return self._head(hidden)

    def use_idle_time(self) -> bool:
        """Make KV memory ready for the next batches, a step of it. Returns False if all is."""
        return self._cache.make_ready()

    def forget_kv(self) -> None:
        """Give back the memory of all KV. No request may be running."""
        self._cache.forget()

    @contextmanager
    def _boundary(self, at_boundary: AtBoundary | None) -> Iterator[None]:
        """Have layers call ``at_boundary``, and afterwards that of the outer pass again."""
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
