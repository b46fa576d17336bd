"""Loads models whose weights stay quantised: from the GGUF file where they lie, or made at load."""

from __future__ import annotations

import logging
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pla_serve.engine.config import EngineConfig, Quantization
from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.kernels.quantised import Quantised
from pla_serve.engine.layers.cpu.experts import ExpertMlps
from pla_serve.engine.layers.cpu.quantised import (
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
)
from pla_serve.engine.loading import ModelSource, UnsupportedModel, load_config
from pla_serve.engine.loading.formats import BY_NAME, FLOATS, WeightFormat
from pla_serve.engine.loading.mixtures import is_experts, linears_of
from pla_serve.engine.loading.source import some
from pla_serve.engine.loading.stock import rotary_owner
from pla_serve.engine.loading.tensors import StoredTensor, TensorFile, require_names

log = logging.getLogger(__name__)

AT_LOAD: dict[Quantization, WeightFormat] = {"int8": BY_NAME["Q8_0"], "int4": BY_NAME["Q4_1"]}
"""Formats of ``--quantization``: 32 weights share a scale, and with int4 an offset as well."""
NO_KERNELS = "--quantization {} needs kernels of this project, and none work here; see the log"
NEIGHBOURS = ("llama",)
"""Architectures of whose queries and keys a GGUF file has the two elements that the rotary
embedding turns together next to each other."""


def load_kept(
    source: ModelSource, dtype: torch.dtype, kernels: Quantised, attn_implementation: str
) -> nn.Module:
    """Return a model of ``transformers`` whose quantised weights are those of the GGUF file.

    Args:
        dtype: type of activations, norms, biases and weights that are not quantised.

    Raises:
        UnsupportedModel: the file has not the weights that the model needs.
        ModelUnavailable: the file is gone.
    """
    config = load_config(source)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    file = TensorFile(source.folder)
    tied = bool(config.tie_word_embeddings)
    require_names(
        file, (name for name, _ in model.named_parameters())
    )  # a tied head has none of its own
    reader = _Reader(file, config, dtype, kernels)
    for name, module in list(model.named_modules()):
        if tied and name == "lm_head":
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            _put(model, name, reader.module(name, module))
        else:
            for own, parameter in list(module.named_parameters(recurse=False)):
                read = reader.floats(f"{name}.{own}", tuple(parameter.shape))
                setattr(module, own, nn.Parameter(read, requires_grad=False))
    if tied:
        _put(model, "lm_head", _head_of(model.get_input_embeddings()))
    owner: Any = rotary_owner(model)  # no file has its values, so it is made again, with memory
    owner.rotary_emb = type(owner.rotary_emb)(config)
    model.requires_grad_(False)
    loaded: nn.Module = model.eval()
    return loaded


def stays_quantised(config: EngineConfig, source: ModelSource, kernels: CpuKernels) -> bool:
    """Whether the weights of a GGUF file stay quantised.

    Raises:
        ValueError: they have to, but there are no kernels that multiply them.
    """
    if source.kept is None or kernels.quantised is not None:
        return source.kept is not None
    if config.quantization == "keep":
        raise ValueError(NO_KERNELS.format("keep"))
    log.warning("weights are served as floats: there are no kernels for quantised ones")
    return False


def quantise(model: nn.Module, config: EngineConfig, kernels: CpuKernels) -> None:
    """Quantise the weights of a loaded model, if the settings say so.

    Raises:
        ValueError: there are no kernels that multiply them.
    """
    if config.quantization not in AT_LOAD:
        return
    if kernels.quantised is None:
        raise ValueError(NO_KERNELS.format(config.quantization))
    quantise_at_load(model, config.quantization, kernels.quantised)


def quantise_at_load(model: Any, kind: Quantization, kernels: Quantised) -> None:
    """Replace the linears and the embedding of a loaded model by quantised ones.

    Rounding is that of the gguf package, to the nearest level. Linears whose inputs are no
    multiple of 32 stay as they are, and the log names them.
    """
    form = AT_LOAD[kind]
    left = []
    dtype = next(model.parameters()).dtype
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    for name, module in list(model.named_modules()):
        if is_experts(module):
            _put(model, name, _quantised_experts(module, form, kernels))
        if not isinstance(module, nn.Linear) or (tied and module is head):
            continue
        if module.in_features % form.weights:
            left.append(name)
            continue
        _put(model, name, _quantised(module.weight, module.bias, form, kernels))
    if embedding.weight.shape[1] % form.weights == 0:
        rows = _quantised(embedding.weight, None, form, kernels)
        model.set_input_embeddings(QuantisedEmbedding(rows, dtype))
        if tied:
            model.set_output_embeddings(rows)
    if left:
        log.warning("not quantised, since 32 does not divide their inputs: %s", some(left))


def _quantised_experts(experts: nn.Module, form: WeightFormat, kernels: Quantised) -> ExpertMlps:
    """Return the experts with quantised weights.

    Raises:
        ValueError: the format does not divide the inputs of a linear.
    """
    made = []
    for linears in linears_of(experts):
        for linear in linears:
            if linear.in_features % form.weights:
                raise ValueError(
                    f"experts with {linear.in_features} inputs cannot be quantised, since "
                    f"{form.weights} does not divide them; leave out --quantization"
                )
        made.append(tuple(_quantised(linear.weight, None, form, kernels) for linear in linears))
    return ExpertMlps(made)


def _quantised(
    weight: torch.Tensor, bias: torch.Tensor | None, form: WeightFormat, kernels: Quantised
) -> QuantisedLinear:
    number = gguf.GGMLQuantizationType(form.number)
    rows = gguf.quants.quantize(weight.detach().float().numpy(), number)
    return QuantisedLinear(kernels, [QuantisedWeight(form, weight.shape[1], rows)], bias)


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _head_of(embedding: nn.Module) -> nn.Module:
    if isinstance(embedding, QuantisedEmbedding):
        return embedding.linear
    assert isinstance(embedding, nn.Embedding)
    head: nn.Module = _linear(embedding.weight, None)
    return head


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    made: Any = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


class _Reader:
    """Makes modules of the tensors of a file."""

    def __init__(
        self, file: TensorFile, config: Any, dtype: torch.dtype, kernels: Quantised
    ) -> None:
        self._file = file
        self._dtype = dtype
        self._kernels = kernels
        self._neighbours = config.model_type in NEIGHBOURS
        self._head_dim = int(config.head_dim)

    def module(self, name: str, stock: nn.Linear | nn.Embedding) -> nn.Module:
        """Return the module with its weights, quantised if those of the file are."""
        stored = self._stored(f"{name}.weight", tuple(stock.weight.shape))
        order = self._order(name, stored.shape[0])
        bias = None
        if isinstance(stock, nn.Linear) and stock.bias is not None:
            bias = self.floats(f"{name}.bias", tuple(stock.bias.shape))
            bias = bias if order is None else bias[order]
        if stored.format in FLOATS:
            weight = self._as_floats(stored)
            weight = weight if order is None else weight[order]
            if isinstance(stock, nn.Linear):
                linear: nn.Module = _linear(weight, bias)
                return linear
            tokens, width = weight.shape
            return nn.Embedding(tokens, width, _weight=weight)
        form = BY_NAME[stored.format]
        rows = stored.data.reshape(stored.shape[0], form.row_bytes(stored.shape[1]))
        weight_of_file = QuantisedWeight(form, stored.shape[1], rows, order)
        made = QuantisedLinear(self._kernels, [weight_of_file], bias)
        return made if isinstance(stock, nn.Linear) else QuantisedEmbedding(made, self._dtype)

    def floats(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor that is not quantised, such as a norm, in this model's dtype."""
        return self._as_floats(self._stored(name, shape))

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stored = self._file.read(name)
        if stored.shape != shape:
            raise UnsupportedModel(
                f"{name} in {self._file.path} has the shape {stored.shape}, not {shape}."
            )
        return stored

    def _as_floats(self, stored: StoredTensor) -> torch.Tensor:
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        read = torch.frombuffer(bytearray(stored.data), dtype=kinds[stored.format])
        return read.view(stored.shape).to(self._dtype)

    def _order(self, name: str, outputs: int) -> torch.Tensor | None:
        """Return which row of the file is each row of the model; None if they are the same."""
        if not self._neighbours or not name.endswith(("q_proj", "k_proj")):
            return None
        rows = np.arange(outputs).reshape(-1, self._head_dim // 2, 2).swapaxes(1, 2)
        return torch.from_numpy(rows.reshape(-1).copy())
