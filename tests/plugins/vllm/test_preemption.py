"""Steps left between layers: real passes of a small model in vLLM's engine, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request
from vllm.v1.utils import CpuGpuBuffer

from tests.plugins.vllm.tiny_engine import BLOCK, LAYERS, VOCABULARY, LocalEngine, Run, tiny_model

OURS = {"scheduler_cls": "pla_serve.plugins.vllm.LengthAwareScheduler"}
OPTIONS = {"pla_serve": {"boundary_tokens": 48}}
MOST_BLOCKS = 45
"""KV blocks: fewer than what runs at the same time wants, so that requests are preempted."""


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    answer: int
    sampling: dict[str, Any]


SAMPLING: dict[int, dict[str, Any]] = {
    1: {"temperature": 0.9, "seed": 5},
    2: {"repetition_penalty": 1.4, "presence_penalty": 0.5},
    3: {"min_tokens": 3, "stop_token_ids": [1, 2, 3, 4, 5, 6, 7, 8]},
    4: {"logit_bias": {7: 3.0}, "logprobs": 2},
    5: {"prompt_logprobs": 1},
}


def make_prompts() -> dict[str, Prompt]:
    """Shorts of 3 to 40 tokens, longs of 100 to 600; a third begin as another one does."""
    rng, found = Random(3), dict[str, Prompt]()
    for number in range(36):
        long = number % 3 == 0
        size = rng.randint(100, 600) if long else rng.randint(3, 40)
        ids = [rng.randrange(VOCABULARY) for _ in range(size)]
        if number % 4 == 3:
            shared = rng.choice(list(found.values())).ids
            ids = shared[: rng.randint(1, len(shared))] + ids[:30]
        sampling = SAMPLING.get(number % 7, {})
        found[f"{'long' if long else 'short'}{number}"] = Prompt(ids, rng.randint(1, 24), sampling)
    return found


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """From vLLM's own scheduler, one request after the other."""
    engine = LocalEngine(folder, enable_prefix_caching=False)
    try:
        run = Run(engine)
        for name in PROMPTS:
            engine.send(ask(engine, name))
            run.drain()
        assert engine.model_executor._nesting is None
        assert len({tuple(tokens) for tokens in run.tokens.values()}) > len(PROMPTS) - 6
        return run.tokens
    finally:
        engine.shutdown()


@pytest.fixture(scope="module", params=["fcfs", "priority"])
def engine(
    folder: Path, expected: dict[str, list[int]], request: pytest.FixtureRequest
) -> Iterator[LocalEngine]:
    """With steps that are left; after ``expected``, because a process has one engine at a time."""
    found = LocalEngine(
        folder,
        additional_config=OPTIONS,
        num_gpu_blocks_override=MOST_BLOCKS,
        scheduling_policy=request.param,
        **OURS,
    )
    yield found
    found.shutdown()


def ask(engine: LocalEngine, name: str, as_name: str | None = None) -> Request:
    """The request of a prompt, for its engine to hash."""
    prompt = PROMPTS[name]
    return engine.request(as_name or name, prompt.ids, prompt.answer, **prompt.sampling)


class Pace:
    """In the place of `HostPace`: every layer boundary is a moment of the run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def pace(self) -> None:
        self._run.moment()

    def end(self) -> None:
        pass


def start(engine: LocalEngine) -> Run:
    """A run whose moments are layer boundaries, too."""
    engine.model_executor.attach(engine)
    engine.scheduler.reset_prefix_cache()  # what other tests have computed
    run = Run(engine)
    nesting = engine.model_executor._nesting
    assert nesting is not None
    nesting._run_ahead = Pace(run)
    return run


def nested_steps(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """A list to which every nested step is added as it begins."""
    nesting, found = engine.model_executor._nesting, list[dict[str, int]]()
    original = nesting._run

    def run(output: Any) -> None:
        found.append(dict(output.num_scheduled_tokens))
        original(output)

    monkeypatch.setattr(nesting, "_run", run)
    return found


def at_rest(engine: LocalEngine) -> None:
    """Nothing is left of any request, on the scheduler's side or the runner's."""
    scheduler = engine.scheduler
    assert not scheduler.requests
    assert not scheduler.running
    assert scheduler._outer is None
    assert len(scheduler.waiting) == 0
    assert not scheduler.planner.known
    assert not scheduler._steps
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == MOST_BLOCKS - 1  # one is the null block


def test_a_short_that_comes_within_a_step_is_answered_within_it(
    engine: LocalEngine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(engine)
    steps = nested_steps(engine, monkeypatch)
    engine.send(ask(engine, "long0"))
    run.moments[2] = [lambda: engine.send(ask(engine, "short1"))]
    run.drain()
    assert steps[0] == {"short1": len(PROMPTS["short1"].ids)}
    assert run.tokens == {name: expected[name] for name in ("long0", "short1")}
    at_rest(engine)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_vllms_under_any_schedule(
    engine: LocalEngine, expected: dict[str, list[int]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random arrivals and aborts, at boundaries and between steps, in too few KV blocks."""
    run, rng = start(engine), Random(seed)
    steps = nested_steps(engine, monkeypatch)
    gone = set(rng.sample(sorted(PROMPTS), 9))
    for name in PROMPTS:
        when = rng.randrange(160)
        request = ask(engine, name, f"{name}/{seed}")
        request.priority = rng.randrange(3)
        run.moments.setdefault(when, []).append(lambda it=request: engine.send(it))
        if name in gone:
            when += rng.randrange(40)
            run.moments.setdefault(when, []).append(lambda it=request: engine.abort(it.request_id))
    run.drain()
    assert steps
    for name, wanted in expected.items():
        got = run.tokens.get(f"{name}/{seed}", [])
        assert got == (wanted[: len(got)] if name in gone else wanted), name
        if name not in gone:
            assert run.finished[f"{name}/{seed}"] in (FinishReason.LENGTH, FinishReason.STOP)
    at_rest(engine)


def tensors_of(holder: Any, found: dict[int, torch.Tensor], depth: int = 0) -> None:
    """Collect every tensor and array that hangs on an object, by address."""
    if isinstance(holder, torch.Tensor):
        found[holder.data_ptr()] = holder
    elif isinstance(holder, np.ndarray) and holder.dtype != object:
        found[holder.ctypes.data] = torch.from_numpy(holder)
    elif isinstance(holder, dict):
        for value in holder.values():
            tensors_of(value, found, depth)
    elif isinstance(holder, list | tuple):
        for value in holder:
            tensors_of(value, found, depth)
    elif depth < 3 and type(holder).__module__.startswith("vllm.v1"):
        tensors_of(getattr(holder, "__dict__", {}), found, depth + 1)


def buffers(runner: Any) -> dict[str, torch.Tensor]:
    """The buffers of a runner's passes, and its attention builders', but not weights or KV."""
    found: dict[int, torch.Tensor] = {}
    for value in vars(runner).values():
        if isinstance(value, CpuGpuBuffer | torch.Tensor | np.ndarray):
            tensors_of(vars(value) if isinstance(value, CpuGpuBuffer) else value, found)
    tensors_of(runner.input_batch, found)
    for groups in runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                tensors_of(builder, found)
    return {f"{address:x} {tuple(it.shape)}": it for address, it in found.items() if it.numel()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def watch(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], set[str]]:
    """Watch the outer step's buffers and metadata over nested steps.

    Returns:
        A list with the number of buffers at each nested step, and what changed.
    """
    from vllm.forward_context import get_forward_context

    runner = engine.model_executor.driver_worker.worker.model_runner
    nesting, counts, changed = engine.model_executor._nesting, list[int](), set[str]()
    original = nesting._run

    def run(output: Any) -> None:
        context = get_forward_context()
        watched = buffers(runner)
        metadata: dict[int, torch.Tensor] = {}
        for value in (*context.attn_metadata.values(), context.slot_mapping):
            tensors_of(vars(value) if not isinstance(value, dict) else value, metadata)
        watched |= {f"metadata {key:x}": value for key, value in metadata.items()}
        rows = list(runner.input_batch.req_ids)
        before = {name: digest(tensor) for name, tensor in watched.items()}
        original(output)
        changed.update(name for name, tensor in watched.items() if digest(tensor) != before[name])
        if get_forward_context() is not context or list(runner.input_batch.req_ids) != rows:
            changed.add("context")
        counts.append(len(watched))

    monkeypatch.setattr(nesting, "_run", run)
    return counts, changed


def mixed(engine: LocalEngine, run: Run) -> None:
    """Two longs, and shorts that come within their steps."""
    for number, name in enumerate(sorted(PROMPTS)[:16]):
        request = ask(engine, name)
        run.moments.setdefault(3 * number, []).append(lambda it=request: engine.send(it))


def test_a_nested_step_touches_nothing_of_the_outer_one(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(engine)
    counts, changed = watch(engine, monkeypatch)
    mixed(engine, run)
    run.drain()
    assert len(counts) > 5
    assert min(counts) > 40
    assert not changed


@pytest.mark.parametrize("shared", ["positions", "query_start_loc", "input_ids"])
def test_the_watch_sees_a_buffer_that_both_have(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    run = start(engine)
    runner = engine.model_executor.driver_worker.worker.model_runner
    monkeypatch.setattr(engine.model_executor._nesting._twin, shared, getattr(runner, shared))
    _, changed = watch(engine, monkeypatch)
    mixed(engine, run)
    run.drain()
    assert changed


def test_the_twin_shares_no_buffer(engine: LocalEngine) -> None:
    start(engine)
    runner = engine.model_executor.driver_worker.worker.model_runner
    twin = engine.model_executor._nesting._twin
    addresses = [
        {tensor.untyped_storage().data_ptr() for tensor in buffers(one).values()}
        for one in (runner, twin)
    ]
    assert len(addresses[1]) > 30
    assert not addresses[0] & addresses[1]
    assert twin.requests is runner.requests
    assert twin.model is runner.model
    assert twin.kv_caches is runner.kv_caches


def test_a_prefix_that_is_being_computed_is_not_taken_for_a_cached_one(
    engine: LocalEngine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM enters blocks into its prefix cache when it schedules a step, not when they are full."""
    run = start(engine)
    steps = nested_steps(engine, monkeypatch)
    ids = Random(11).choices(range(VOCABULARY), k=200)
    engine.send(engine.request("whole", ids, 4))
    follow = [*ids[: 5 * BLOCK], 1, 2, 3]
    run.moments[2] = [
        lambda: engine.send(engine.request("follow", follow, 4)),
        lambda: engine.send(ask(engine, "short1", "other")),
    ]
    run.drain()
    assert steps
    assert all("follow" not in step for step in steps)
    assert run.tokens["other"] == expected["short1"]
    again = Run(engine)
    engine.scheduler.reset_prefix_cache()
    engine.send(engine.request("alone", follow, 4))
    again.drain()
    assert run.tokens["follow"] == again.tokens["alone"]
    at_rest(engine)


def test_an_abort_of_the_step_under_way_waits_for_its_end(
    engine: LocalEngine, expected: dict[str, list[int]]
) -> None:
    run = start(engine)
    engine.send(ask(engine, "long3"))

    def at_boundary() -> None:
        engine.abort("long3")
        engine.send(ask(engine, "short1"))

    def still_there() -> None:
        assert "long3" in engine.scheduler.requests

    run.moments |= {2: [at_boundary], 4: [still_there]}
    run.drain()
    assert run.tokens == {"short1": expected["short1"]}
    at_rest(engine)


def test_streams_get_tokens_within_a_long_step(
    engine: LocalEngine, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps do not ride in a step that can be left: they are due inside it."""
    run = start(engine)
    steps = nested_steps(engine, monkeypatch)
    monkeypatch.setattr(engine.scheduler.planner, "token_seconds", lambda streams, context: 0.0)
    stream = max((n for n in PROMPTS if "short" in n), key=lambda name: PROMPTS[name].answer)
    engine.send(ask(engine, stream))
    run.moments[3] = [lambda: engine.send(ask(engine, "long0"))]
    run.drain()
    assert steps.count({stream: 1}) >= LAYERS
    assert run.tokens == {name: expected[name] for name in (stream, "long0")}
    at_rest(engine)


def test_a_short_that_has_to_wait_for_the_step_does_not_make_streams_step_at_each_layer(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(engine)
    steps = nested_steps(engine, monkeypatch)
    monkeypatch.setattr(engine.scheduler.planner, "token_seconds", lambda streams, context: 1e9)
    ids = Random(12).choices(range(VOCABULARY), k=200)
    follow = [*ids[: 5 * BLOCK], 1, 2, 3]
    engine.send(engine.request("stream", [5, 6, 7], 20))
    run.moments |= {
        3: [lambda: engine.send(engine.request("whole", ids, 4))],
        5: [lambda: engine.send(engine.request("follow", follow, 4))],
    }
    run.drain()
    assert not steps
    assert {name: len(tokens) for name, tokens in run.tokens.items()} == {
        "stream": 20,
        "whole": 4,
        "follow": 4,
    }
    at_rest(engine)


def test_more_input_for_a_request_under_way_waits_for_its_step(
    engine: LocalEngine, expected: dict[str, list[int]]
) -> None:
    run = start(engine)
    again = ask(engine, "long0")
    engine.send(ask(engine, "long0"))
    seen: list[int] = []
    run.moments |= {
        2: [lambda: engine.send(again), lambda: engine.send(ask(engine, "short1"))],
        4: [lambda: seen.append(engine.input_queue.qsize())],
    }
    original = engine.scheduler.add_request
    engine.scheduler.add_request = lambda request: None if request is again else original(request)
    try:
        run.drain()
    finally:
        engine.scheduler.add_request = original
    assert seen == [2]
    assert run.tokens == {name: expected[name] for name in ("long0", "short1")}
    at_rest(engine)
