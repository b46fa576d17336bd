"""Settings of Gemma 3 that its GGUF files do not name, because llama.cpp has them in its code."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pla_serve.engine.loading.errors import UnsupportedModel

MODEL_TYPE = "gemma3_text"
"""Model type of transformers for the GGUF architecture gemma3."""
LOCAL_THETA = 10000.0
"""Rotary base of the layers with a window. Files have that of the other layers only."""
PATTERN = 6
"""Each layer of this number sees the whole context; the ones between have the window."""
LAYERS_OF_27B = 62
"""Layers of Gemma 3 27B, which scales queries by hidden size / heads in place of the head size."""


def restore(config: PreTrainedConfig, metadata: dict[str, Any]) -> None:
    """Set windows, rotary bases and the scale of queries as llama.cpp's code for gemma3 does.

    Args:
        config: as transformers reads it from the file; changed in place.
        metadata: of the file.

    Raises:
        UnsupportedModel: the file has no window, so its layers are not those of Gemma 3.
    """
    window = int(metadata.get("gemma3.attention.sliding_window", 0))
    if window < 1:
        raise UnsupportedModel("its metadata lacks attention.sliding_window.")
    layers = range(1, int(config.num_hidden_layers) + 1)
    config.sliding_window = window
    config.layer_types = [
        "full_attention" if number % PATTERN == 0 else "sliding_attention" for number in layers
    ]
    config.rope_parameters = {
        "full_attention": {
            "rope_type": "default",
            "rope_theta": float(metadata.get("gemma3.rope.freq_base", 1e6)),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
    }
    per_head = config.hidden_size // config.num_attention_heads
    large = config.num_hidden_layers == LAYERS_OF_27B
    config.query_pre_attn_scalar = per_head if large else config.head_dim
    config.tie_word_embeddings = True
