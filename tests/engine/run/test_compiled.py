"""Compiled layers: the same answers, boundaries that stay, no compiling per length, a way back."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from pla_serve.engine.attention.interface import APART
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader
from pla_serve.engine.device.marks import HostDevice
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import cpu
from pla_serve.engine.layers.cpu import PackedLinear
from pla_serve.engine.loading import decoder_layers
from pla_serve.engine.run.compiled import TRIALS, compile_layers
from pla_serve.engine.run.executor import BatchExecutor
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.runner import ModelRunner
from tests.engine.chaos import ChaosPolicy
from tests.engine.test_outputs import serve_at_random
from tests.engine.tiny import BLOCK, CONFIGS, MAX_BLOCKS, make_engine, reference_model

CPU = torch.device("cpu")
# Inductor imports a module of torch's that warns of itself.
pytestmark = pytest.mark.filterwarnings("default")
"""Torch's compiler warns of what it imports, which differs with what else is installed."""


class Compiled:
    """A tiny model whose layers went through torch.compile."""

    def __init__(self, name: str, backend: object) -> None:
        config = CONFIGS[name]()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=APART).eval()
        model.load_state_dict(reference_model(name).state_dict())
        model.requires_grad_(False)
        self.layers = decoder_layers(model, config.num_hidden_layers)
        cpu.optimise(model, keep=self.layers)
        self.packed = sum(isinstance(module, PackedLinear) for module in model.modules())
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
        shape = KVShape(config.num_hidden_layers, 2, head_dim, torch.float32)
        cache = KVCache(shape, MAX_BLOCKS * BLOCK, CPU)
        self.runner = ModelRunner(model, self.layers, cache, SdpaCpu())
        self.counts = GridCounts()
        self.executor = BatchExecutor(
            self.runner, None, DirectUploader(), HostDevice(), BLOCK, self.counts
        )
        self.used = compile_layers(self.layers, self.run, BLOCK, self.counts, backend)  # type: ignore[arg-type]

    def run(self, requests: list[SpanRequest]) -> torch.Tensor:
        return self.executor.forward(requests, lambda: None).logits


@pytest.fixture
def fresh() -> None:
    """What other tests have compiled does not count."""
    torch.compiler.reset()
    counters.clear()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("fresh")
def test_served_at_random_the_answers_are_those_of_generate() -> None:
    """Prefills, steps and nested batches of all lengths; nothing is compiled for any of them."""
    name = "qwen3"
    made = Compiled(name, "eager")
    assert made.used
    assert made.packed == 1, "the output matrix is packed, and the layers are left alone"
    assert made.counts.compile_failures == 0
    before = compiled_graphs()
    # One set of pieces around attention for each of the two kinds of length, not for each layer.
    assert 0 < before <= 5 * len(TRIALS)
    engine = make_engine(name, ChaosPolicy(1, express=0.4), executor=made.executor)
    serve_at_random(engine, name, Random(1), count=8, aborts=True)
    assert compiled_graphs() == before
    assert made.executor.counts() is made.counts


@pytest.mark.usefixtures("fresh")
def test_with_the_real_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor and the machine's C++ compiler, on one model."""
    # Setuptools, which it imports, wants to be there before anybody imports distutils.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    made = Compiled("llama", "inductor")
    assert made.used
    engine = make_engine("llama", ChaosPolicy(5, express=0.4), executor=made.executor)
    before = compiled_graphs()
    serve_at_random(engine, "llama", Random(5), count=4, aborts=False)
    assert compiled_graphs() == before


def breaks(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    raise RuntimeError("no such compiler\nand more of it")


class BreaksLater:
    """Compiles what the trial needs, and nothing after it."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        if self.broken:
            raise RuntimeError("out of patience")
        return graph.forward


def lies(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    def run(*arguments: torch.Tensor) -> object:
        return tuple(
            out * 1.5 if isinstance(out, torch.Tensor) and out.is_floating_point() else out
            for out in graph.forward(*arguments)
        )

    return run


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("backend", "reason"), [(breaks, "no such compiler"), (lies, "differ")])
def test_what_cannot_be_compiled_runs_as_it_is(
    backend: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = Compiled("llama", backend)
    assert not made.used
    assert made.counts.compile_failures == 1
    assert reason in caplog.text
    engine = make_engine("llama", ChaosPolicy(2, express=0.4), executor=made.executor)
    serve_at_random(engine, "llama", Random(2), count=3, aborts=False)


@pytest.mark.usefixtures("fresh")
def test_compiling_that_fails_while_serving_is_no_request_s_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = BreaksLater()
    made = Compiled("llama", backend)
    assert made.used
    backend.broken = True
    torch.compiler.reset()  # everything is compiled anew, as after a guard that never failed before
    engine = make_engine("llama", ChaosPolicy(3, express=0.4), executor=made.executor)
    serve_at_random(engine, "llama", Random(3), count=3, aborts=False)
    assert made.counts.compile_failures == 1
    assert "out of patience" in caplog.text
