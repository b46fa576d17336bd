"""Two ranks, each a process, joined by gloo: tokens are those of ``transformers.generate``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.rank import BuiltRank
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.sizing import GIB
from pla_serve.engine.parallel.commands import CommandSender, End
from pla_serve.engine.parallel.leading import LeadingExecutor
from pla_serve.engine.parallel.team import Team
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from tests.engine.chaos import ChaosPolicy
from tests.engine.parallel.peer import command_folder, load_all
from tests.engine.test_outputs import assert_at_rest, serve_at_random
from tests.engine.test_scoring import assert_scores
from tests.engine.tiny import BLOCK, Engine, expected, make_engine, reference_model, write_tokenizer

MODELS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2-moe": "qwen2-moe",
    "captured": "llama",
}
"""Name on the ranks, and the reference that it must equal."""
BLOCKS = 256
FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Pair:
    """Two ranks that have loaded all models."""

    loaded: dict[str, BuiltRank]
    executors: dict[str, LeadingExecutor]

    def engine(self, name: str, policy: object, **options: object) -> Engine:
        return make_engine(MODELS[name], policy, executor=self.executors[name], **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("models")
    for name, reference in MODELS.items():
        reference_model(reference).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        block_tokens=BLOCK,
        kv_cache_gib=BLOCKS * BLOCK * 2 * 3 * 2 * 16 * 4 / GIB,
        tensor_parallel_size=2,
    )
    start = "from tests.engine.parallel import peer; peer.main()"
    team = Team(config, program=("-c", start))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded = load_all(config, team.meet(torch.device("cpu")))
        senders = {name: CommandSender(command_folder(team.folder, name), 2) for name in MODELS}
        executors = {
            name: LeadingExecutor(loaded[name].execution.executor, send)
            for name, send in senders.items()
        }
        yield Pair(loaded, executors)
        for send in senders.values():
            send(End())
            send.close(5.0)
    finally:
        team.close()
        torch.set_num_threads(threads)


def test_a_rank_holds_half_of_the_kv(pair: Pair) -> None:
    for name, loaded in pair.loaded.items():
        assert loaded.execution.cache.shape.heads == 1
        assert loaded.memory.plan.blocks >= BLOCKS, name
        assert loaded.kv_bytes_per_token == 2 * loaded.execution.cache.shape.bytes_per_token
    assert len(pair.loaded["captured"].execution.shapes) == 4


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen2-moe"])
def test_logits_are_those_of_one_rank(pair: Pair, name: str) -> None:
    prompt = [5, 17, 3, 8, 60, 22, 7]
    batch = [
        SpanRequest(prompt, 0, [(0, 2)], True),
        SpanRequest([9] * 90, 0, [(2, 25)], True),
        SpanRequest([4], 0, [(25, 26)], False),
    ]
    whole = reference_model(name)
    with torch.inference_mode():
        right = [whole(torch.tensor([r.tokens])).logits[0, -1] for r in batch[:2]]
    got = pair.executors[name].forward(batch, lambda: None).logits
    torch.testing.assert_close(got, torch.stack(right), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(MODELS))
@FEW
@given(seed=st.integers(0, 2**32), aborts=st.booleans(), tight=st.booleans())
def test_random_schedules(pair: Pair, name: str, seed: int, aborts: bool, tight: bool) -> None:
    rng = Random(seed)
    engine = pair.engine(
        name,
        ChaosPolicy(seed),
        blocks=rng.randint(30, 60) if tight else BLOCKS,
        short_reserve=rng.randint(0, 2),
        prefix_cache=rng.random() < 0.7,
    )
    serve_at_random(engine, MODELS[name], rng, count=8, aborts=aborts)


@pytest.mark.parametrize("policy", ["fcfs", "laps", "flowprefill", "length-aware"])
@FEW
@given(seed=st.integers(0, 2**32), tight=st.booleans())
def test_policies(pair: Pair, policy: str, seed: int, tight: bool) -> None:
    rng = Random(seed)
    cost = CostModel()
    config = PolicyConfig(
        boundary_tokens=rng.choice((4, 16)),
        long_chunk_tokens=rng.choice((5, 16, 64)),
        max_batch_tokens=rng.choice((16, 64, 256)),
        max_batch_requests=rng.choice((1, 3, 8)),
    )
    engine = pair.engine(
        "captured",
        create_policy(policy, config, cost),
        cost=cost,
        blocks=40 if tight else BLOCKS,
        short_reserve=2,
    )
    serve_at_random(engine, "llama", rng, count=6, aborts=True)


@pytest.mark.parametrize("name", ["llama", "captured"])
def test_prompts_are_scored_on_both_ranks(pair: Pair, name: str) -> None:
    engine = pair.engine(name, ChaosPolicy(4))
    prompt = tuple(1 + (7 * i) % 90 for i in range(40))
    engine.add("scored", prompt, prompt_logprobs=2)
    engine.add("other", prompt[:9])
    engine.run()
    assert_scores(MODELS[name], prompt, engine.outputs("scored")[0], 2)
    assert engine.tokens("other") == expected(MODELS[name], prompt[:9], 8)
    assert_at_rest(engine)


def test_shapes_are_captured_on_both_ranks_while_serving(pair: Pair) -> None:
    policy = create_policy("fcfs", PolicyConfig(), CostModel())
    engine = pair.engine("captured", policy)
    counts = pair.executors["captured"].counts()
    assert counts is not None
    for number in range(34):
        engine.add(str(number), [1 + number] * 40, max_tokens=1)
        engine.run()
    assert counts.replays["48x1"] > 0, counts
    assert engine.tokens("33") == expected("llama", (34,) * 40, 1)
    assert_at_rest(engine)


def test_memory_runs_out_and_everyone_is_served(pair: Pair) -> None:
    engine = pair.engine("llama", ChaosPolicy(3), blocks=30, prefix_cache=False)
    for number in range(6):
        engine.add(str(number), [number + 2] * 40, max_tokens=30, ignore_eos=True)
    engine.run()
    assert engine.loop._telemetry.recompute_preemptions > 0, "the test is too easy"
    assert all(len(engine.tokens(str(number))) == 30 for number in range(6))
    assert_at_rest(engine)


def test_samples_are_those_of_one_rank(pair: Pair) -> None:
    made = []
    for engine in (pair.engine("qwen2", ChaosPolicy(0)), make_engine("qwen2", ChaosPolicy(0))):
        for number in range(4):
            engine.add(str(number), [7, 8, 9], seed=number, temperature=0.8, max_tokens=12)
        engine.run()
        made.append([engine.tokens(str(number)) for number in range(4)])
    assert made[0] == made[1]
    assert len(set(made[0])) > 1
