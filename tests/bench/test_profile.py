"""The design that measures a machine, against a server whose costs are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import astuple
from typing import Any

import msgspec
import numpy as np
import pytest

from pla_serve.bench.calibrate import Probe
from pla_serve.bench.client import RequestTarget
from pla_serve.bench.profile import (
    SETTLE_STEPS,
    ProfileError,
    Transfer,
    drive,
    machine_of,
    wait_idle,
)
from pla_serve.bench.text import make_filler
from pla_serve.policy.cost import REFIT_EVERY, CostModel, CostProfile, work_of
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from pla_serve.simulator.machine import Machine
from tests.bench.virtual import event, run_virtual, usage

TRUE = CostProfile(1e-3, 3e-7, 2e-7, 5e-4, 2e-2)
TRANSFER = Transfer(1e9, 1e-3)


class CacheServer:
    """Prefills what it has not seen; requests of one moment share batches. Keeps every batch."""

    def __init__(self, caches: bool = True) -> None:
        self.caches = caches
        self.batches: list[Batch] = []
        self._prompts: list[list[int]] = []
        self._waiting: list[tuple[Chunk, int]] = []

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        assert path == "/v1/completions"
        yield 200, self._answer(msgspec.json.decode(body))

    async def _answer(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        prompt, answer = body["prompt"], body["max_tokens"]
        cached = self._cached(prompt)
        self._prompts.append(prompt)
        self._waiting.append((Chunk(str(id(body)), len(prompt) - cached, cached), answer))
        await asyncio.sleep(0.01)
        self._run()
        yield event({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
        yield event({"choices": [], "usage": usage(body, answer, cached)})
        yield b"data: [DONE]\n\n"

    def _cached(self, prompt: list[int]) -> int:
        if not self.caches:
            return 0
        same = (
            next((i for i, (a, b) in enumerate(zip(p, prompt, strict=False)) if a != b), len(p))
            for p in self._prompts
        )
        return min(max(same, default=0), len(prompt) - 1)

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self.batches.append(Batch(BatchClass.SHORT, prefills=tuple(c for c, _ in waiting)))
        for step in range(1, waiting[0][1]):
            steps = tuple(Chunk(c.request_id, 1, c.history + c.tokens + step) for c, _ in waiting)
            self.batches.append(Batch(BatchClass.DECODE, decodes=steps))


def driven(longest: int = 8192, *, caches: bool = True) -> CacheServer:
    server = CacheServer(caches)
    probe = Probe(server, RequestTarget("m", "completions"), make_filler("s"), "p", ids=True)
    run_virtual(drive(probe, longest, lambda text: None))
    return server


def metrics(profile: CostProfile = TRUE) -> dict[tuple[str, str], float]:
    units = zip(CostProfile.__slots__, astuple(profile), strict=True)
    return {
        ("pla_serve:layers", ""): 30.0,
        ("pla_serve:kv_tokens", ""): 1000.0,
        ("pla_serve:kv_bytes_per_token", ""): 64.0,
        ("pla_serve:cost_model_error", ""): 0.012,
    } | {("pla_serve:cost_seconds", name.removeprefix("per_")): value for name, value in units}


def test_the_design_identifies_every_coefficient() -> None:
    """From a start that is wrong by far, and with noise, the server's own fit finds them."""
    rng = np.random.default_rng(0)
    true, model = CostModel(TRUE), CostModel(CostProfile(5e-3, 1e-9, 1e-9, 5e-3, 1e-3))
    for batch in driven().batches:
        model.observe(batch, true.seconds(batch) * rng.lognormal(0, 0.02))
    found, wanted = astuple(model.profile), astuple(TRUE)
    assert found == pytest.approx(wanted, rel=0.25)
    assert model.error() < 0.05


def test_no_work_moves_with_another() -> None:
    work = np.array([work_of(batch) for batch in driven().batches], dtype=float)
    scaled = work / np.linalg.norm(work, axis=0)
    assert np.linalg.cond(scaled) < 60


def test_a_small_context_is_respected_and_the_last_fit_sees_everything() -> None:
    assert SETTLE_STEPS > REFIT_EVERY
    for longest in (64, 700, 2048):
        for batch in driven(longest).batches:
            for chunk in (*batch.prefills, *batch.decodes):
                assert chunk.history + chunk.tokens <= longest


def test_a_server_without_a_prefix_cache_is_refused() -> None:
    with pytest.raises(ProfileError, match="prefix cache"):
        driven(caches=False)


def test_the_profile_is_what_the_metrics_say() -> None:
    machine = machine_of(metrics(), "mine", "here", TRANSFER)
    assert machine.profile == TRUE
    assert (machine.name, machine.layers, machine.kv_tokens) == ("mine", 30, 1000)
    assert machine.source == "here; median error of the last predictions 1.2%; transfers assumed"
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine


def test_another_server_is_refused() -> None:
    found = metrics()
    del found["pla_serve:cost_seconds", "kv"]
    with pytest.raises(ProfileError, match="no pla_serve:cost_seconds per kv"):
        machine_of(found, "mine", "here", TRANSFER)


def test_a_busy_server_is_waited_for_and_then_refused() -> None:
    busy = iter([2.0, 1.0, 0.0])
    run_virtual(wait_idle(lambda: {("vllm:num_requests_running", ""): next(busy)}))
    with pytest.raises(ProfileError, match="serves others"):
        run_virtual(wait_idle(lambda: {("vllm:num_requests_waiting", ""): 1.0}))
