"""The part of a causal language model after its decoder, called on its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast


class ModelHead:
    """Computes logits from hidden states as the model does, whatever it does with them.

    Models differ in what comes after the decoder: a matrix, and for some a scale or a cap of the
    logits. All of it is in the ``forward`` of the model, so that is called, with a decoder that
    returns the given hidden states in place of computing them.

    Args:
        model: a causal language model of ``transformers``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.decoder: Any = model.base_model
        """The model without its head. Called like the model, it returns ``last_hidden_state``."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (rows, vocabulary) of hidden states (rows, hidden size)."""
        # Mixtures of experts read one field more of their decoder, which is None here.
        given = MoeModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))
        self.decoder.forward = lambda *args, **kwargs: given
        try:
            logits: torch.Tensor = self._model(inputs_embeds=hidden.unsqueeze(0)).logits
        finally:
            del self.decoder.forward
        return logits[0]
