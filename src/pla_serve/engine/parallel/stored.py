"""Names under which files hold the weights of a model, where those are not its own names.

Models of ``transformers`` have one tensor for all experts of a layer; files have one for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from pla_serve.engine.loading.mixtures import expert_count

GATE_UP = ".experts.gate_up_proj"
DOWN = ".experts.down_proj"


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How the files of a family name what the experts of a layer hold."""

    block: str
    """The block with router and experts, which is ``mlp`` in models."""
    gate: str
    up: str
    down: str


QWEN = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
}
"""By model type."""


def is_of_experts(name: str) -> bool:
    """Whether a weight of a model is the tensor of all experts of a layer."""
    return name.endswith((GATE_UP, DOWN))


def stored_names(config: PreTrainedConfig, name: str) -> list[str]:
    """Return the names in the files of what is one weight of the model.

    For all experts of a layer these are, expert by expert, the gate and what is gated, or the
    output. Example: ``mlp.experts.down_proj`` is ``mlp.experts.0.down_proj.weight`` and so on.
    """
    names = NAMES.get(config.model_type)
    if names is None:
        return [name]
    start = name.replace(".mlp.", f".{names.block}.")
    kinds = (names.gate, names.up) if name.endswith(GATE_UP) else (names.down,)
    if not is_of_experts(name):
        return [start]
    prefix = start.rpartition(".")[0]
    return [f"{prefix}.{e}.{kind}.weight" for e in range(expert_count(config)) for kind in kinds]
