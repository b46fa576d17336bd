"""Decides whether this engine computes a model right.

`check_config` reads the config only. It is cheap and runs before weights are fetched.
`check_supported` also builds the model without memory (on torch's meta device), runs it once, and
records how every layer calls its attention. That finds features that no field of the config shows.
"""

from __future__ import annotations

import contextvars
import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pla_serve.engine.loading.errors import UnsupportedModel
from pla_serve.engine.loading.mixtures import FAMILIES, expert_count

CURE = (
    "Models with causal attention are served, in all or some layers with a sliding window, such "
    "as Llama, Qwen2, Qwen3, Mistral and Gemma 3 (text), and of the mixtures of experts "
    f"{', '.join(sorted(FAMILIES))}."
)

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

UNSTEADY_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of the batch: an answer would depend on
the other requests in its batch."""

HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that stock models pass to attention functions and that do not change the result."""

_PROBE = "pla_serve_probe"
_PROBE_TOKENS = 3


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of attention, equal in every layer, as one KV cache for all layers needs it.

    The windows of layers may differ, because KV of all tokens is kept for each layer.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()
    """For each layer the number of latest tokens, a token itself included, that the token sees;
    None for all tokens. Empty if no layer has a window."""


def check_config(config: PreTrainedConfig) -> None:
    """Refuse models whose config shows that they are not supported.

    Raises:
        UnsupportedModel: names the architecture, the reason, and the cure.
    """
    reason = _config_reason(config)
    if reason is not None:
        raise _refusal(config, reason)


def check_supported(config: PreTrainedConfig) -> AttentionShape:
    """Do `check_config`, and run the model without weights, which takes about a second.

    Raises:
        UnsupportedModel: names the architecture, the reason, and the cure.
    """
    check_config(config)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise _refusal(config, "its config does not say how many layers it has")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise _refusal(config, "transformers has no causal language model for it")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise _refusal(config, "its attention cannot be replaced (no AttentionInterface)")
    if getattr(model_class, "_is_stateful", False):
        raise _refusal(config, "it carries a state other than KV (linear attention or Mamba)")
    model = _build(config)
    reason = _module_reason(config, model)
    if reason is not None:
        raise _refusal(config, reason)
    return _examine(config, _run(config, model))


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Return the list of the model's decoder layers, between which a prefill can be left.

    Raises:
        UnsupportedModel: there is not exactly one list of ``count`` modules.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} is not supported: it has {len(found)} lists of {count} "
            f"decoder layers, where one is expected. {CURE}"
        )
    return found[0]


def _refusal(config: PreTrainedConfig, reason: str) -> UnsupportedModel:
    named = getattr(config, "architectures", None) or [type(config).__name__]
    return UnsupportedModel(
        f"{named[0]} (model_type {config.model_type!r}) is not supported: {reason}. {CURE}"
    )


def _config_reason(config: PreTrainedConfig) -> str | None:
    """Return why the config is not supported; None if it is."""

    def get(name: str) -> Any:
        return getattr(config, name, None)

    if get("is_encoder_decoder"):
        return "it is an encoder-decoder"
    if config.sub_configs:
        nested = ", ".join(sorted(config.sub_configs))
        return f"it is no plain decoder: its config nests others ({nested})"
    if get("quantization_config") is not None:
        return "its weights are quantized, and only float32 and bfloat16 are computed"
    if expert_count(config) and config.model_type not in FAMILIES:
        return "it is a mixture of experts, and of those not a family that is tested"
    experts, chosen = expert_count(config), get("num_experts_per_tok")
    if experts and not (isinstance(chosen, int) and 1 <= chosen <= experts):
        return f"its tokens choose {chosen} of {experts} experts"
    if get("kv_lora_rank"):
        return "it uses multi-head latent attention (MLA)"
    if get("alibi"):
        return "it uses ALiBi position biases"
    kinds = sorted(set(get("layer_types") or ()) - LAYER_TYPES)
    if kinds:
        return f"it has layers of type {', '.join(kinds)}"
    if get("attn_logit_softcapping"):
        return "it caps attention scores (soft-capping)"
    return _rope_reason(get("rope_parameters"))


def _rope_reason(parameters: Any) -> str | None:
    """Return why these rope parameters, one dict or one for each layer type, are not supported."""
    if not isinstance(parameters, dict):
        return None
    kind = parameters.get("rope_type")
    if kind in UNSTEADY_ROPE:
        return f"its rotary embedding ({kind}) depends on the longest sequence in a batch"
    return next(filter(None, map(_rope_reason, parameters.values())), None)


def _module_reason(config: PreTrainedConfig, model: nn.Module) -> str | None:
    """Return why the modules of a model are not supported; None if they are."""
    mixture = config.model_type in FAMILIES
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not mixture and re.search(r"MoE|Moe[A-Z]|Experts|SparseMoe", kind):
            return f"it is a mixture of experts ({kind}), and of those not a family that is tested"
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.RNNBase):
            return f"{name} is a {kind}, which mixes tokens outside attention"
    return None


def _build(config: PreTrainedConfig) -> nn.Module:
    """Build the model on the meta device, with recorders in place of attention and masks."""
    AttentionInterface.register(_PROBE, _record_attention)
    AttentionMaskInterface.register(_PROBE, _record_mask)
    ALL_EXPERTS_FUNCTIONS.register(_PROBE, _skip_experts)
    experts = {"experts_implementation": _PROBE} if expert_count(config) else {}
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=_PROBE, **experts
            )
    except Exception as error:
        raise _refusal(
            config, f"transformers cannot build it ({type(error).__name__}: {error})"
        ) from error
    return model.eval()


@dataclass(slots=True)
class _Trace:
    """Record of one forward pass: how each layer called its attention."""

    modules: list[nn.Module] = field(default_factory=list)
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Query heads, KV heads, key size and value size of each call."""
    layers: list[int] = field(default_factory=list)
    """Index of each decoder layer, in the order in which they were entered."""
    layer_of_call: list[int] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    """Window of each call, as the attention mask of the model has it."""
    masks: list[_WindowMask] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _WindowMask:
    """A mask that the model asked for, in whose place it got ``stand_in``.

    Some models ask for masks that none of their layers uses, so a wrong one is no reason yet.
    """

    stand_in: torch.Tensor
    window: int
    is_right: bool


_trace: contextvars.ContextVar[_Trace] = contextvars.ContextVar("pla_serve_trace")


def _run(config: PreTrainedConfig, model: nn.Module) -> _Trace:
    """Run one forward pass on the meta device, which computes nothing, and record it."""
    trace = _Trace()
    for index, layer in enumerate(decoder_layers(model, config.num_hidden_layers)):
        layer.register_forward_pre_hook(lambda *_, index=index: trace.layers.append(index))
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device="meta")
    token = _trace.set(trace)
    try:
        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=torch.zeros_like(ids),
                # Without a mask, transformers looks for packed sequences by value.
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
    except Exception as error:
        raise _refusal(
            config,
            f"its attention cannot be replaced ({type(error).__name__}: {error})",
        ) from error
    finally:
        _trace.reset(token)
    return trace


def _record_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Record a call of attention; ``query`` is (1, heads, tokens, size)."""
    trace = _trace.get()
    trace.modules.append(module)
    trace.shapes.append((query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
    trace.layer_of_call.append(trace.layers[-1] if trace.layers else -1)
    found = [mask for mask in trace.masks if mask.stand_in is attention_mask]
    if attention_mask is not None and not found:
        trace.reasons.append("it brings an attention mask of its own")
    if found and not found[0].is_right:
        trace.reasons.append(f"its mask of {found[0].window} tokens is no causal sliding window")
    trace.windows.append(found[0].window if found else None)
    said = extras.pop("sliding_window", None)
    if said is not None and said != trace.windows[-1]:
        trace.reasons.append(
            f"it passes sliding_window={said} to its attention, but its mask has no such window"
        )
    if not getattr(module, "is_causal", True) or extras.pop("is_causal", True) is False:
        trace.reasons.append("its attention is not causal")
    for name, setting in extras.items():
        if setting is not None and name not in HARMLESS:
            trace.reasons.append(f"it passes {name} to its attention")
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    return output, None


def _skip_experts(
    module: nn.Module, hidden: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Stand in for the experts, since torch has no product of theirs without memory in float32."""
    return torch.empty_like(hidden)


def _record_mask(*_: Any, **settings: Any) -> torch.Tensor | None:
    """Record a request for a mask; the engine needs none, but the window of each layer."""
    trace = _trace.get()
    function, size = settings.get("mask_function"), settings.get("local_size")
    if size is None:
        if function is not None and getattr(function, "__name__", "") != "causal_mask_function":
            trace.reasons.append("its attention mask is not the causal one")
        return None
    right = isinstance(size, int) and size > 0 and function is not None
    stand_in = torch.empty((1, 1, _PROBE_TOKENS, _PROBE_TOKENS), device="meta")
    mask = _WindowMask(stand_in, size, right and _slides(function, size))
    trace.masks.append(mask)
    return mask.stand_in


def _slides(function: Any, window: int) -> bool:
    """Whether a mask function of transformers is that of a causal sliding window.

    It is tried at the positions where windows and chunks of this size begin and end.
    """
    near = {k * window + d for k in range(4) for d in (-1, 0, 1)} | {0, window // 2}
    places = torch.tensor(sorted(position for position in near if position >= 0))
    queries, keys = places[:, None], places[None, :]
    zero = torch.tensor(0)
    try:
        got = function(zero, zero, queries, keys)
    except Exception:  # it needs more than positions
        return False
    seen = (keys <= queries) & (keys > queries - window)
    return isinstance(got, torch.Tensor) and got.shape == seen.shape and bool((got == seen).all())


def _examine(config: PreTrainedConfig, trace: _Trace) -> AttentionShape:
    count = config.num_hidden_layers
    if trace.reasons:
        raise _refusal(config, trace.reasons[0])
    if trace.layers != list(range(count)):
        raise _refusal(config, "its decoder layers do not run once each, in order")
    if trace.layer_of_call != list(range(count)):
        raise _refusal(config, "its layers do not call attention exactly once each")
    if [getattr(module, "layer_idx", None) for module in trace.modules] != list(range(count)):
        raise _refusal(config, "its attention modules do not number their layers")
    if len(set(trace.shapes)) != 1:
        raise _refusal(config, "its layers differ in attention heads or head size")
    query_heads, kv_heads, key_size, value_size = trace.shapes[0]
    if key_size != value_size:
        raise _refusal(config, f"its keys ({key_size}) and values ({value_size}) differ in size")
    windows = tuple(trace.windows) if any(trace.windows) else ()
    return AttentionShape(count, query_heads, kv_heads, key_size, windows)
