"""Rules that hold for every policy, whatever arrives, breaks off or comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.registry import POLICIES, create_policy
from tests.policy.executor import Executor, Job

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 1e-2)
WINDOWS = (0.0, 0.007, 0.5)


SERVICES = [ServiceLevel.USUAL, ServiceLevel.USUAL, ServiceLevel.PROMISED, ServiceLevel.BULK]


@st.composite
def job_lists(draw: st.DrawFn, most: int = 25) -> list[Job]:
    jobs = []
    now = 0.0
    for number in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 5.0]))
        jobs.append(
            Job(
                id=f"r{number}",
                arrival=now,
                tokens=draw(st.one_of(st.integers(1, 40), st.integers(1, 700))),
                cached=draw(st.sampled_from([0, 0, 17, 900])),
                outputs=draw(st.integers(1, 12)),
                deadline=draw(st.sampled_from([None, None, now, now + 0.2, now + 9])),
                priority=draw(st.sampled_from([0, 0, 0, -1, 2])),
                tenant=draw(st.sampled_from(["", "", "a", "b"])),
                tpot=draw(st.sampled_from([None, None, 0.001, 0.04, 1000.0])),
                service=draw(st.sampled_from(SERVICES)),
                abort_at=draw(st.sampled_from([None, None, None, now + 0.05, now + 1])),
            )
        )
    return jobs


configs = st.builds(
    PolicyConfig,
    max_batch_tokens=st.sampled_from([1, 2, 7, 64, 256, 2048]),
    max_batch_requests=st.sampled_from([1, 2, 3, 8, 64]),
    long_chunk_tokens=st.sampled_from([1, 16, 100, 512]),
    boundary_tokens=st.sampled_from([None, 0, 1, 32, 100, 10_000]),
    long_share=st.sampled_from([0.05, 0.5, 0.9]),
    express_burst_seconds=st.sampled_from([None, 0.0, 0.1, 2.0]),
    itl_slo_ms=st.sampled_from([None, 1.0, 30.0, 1000.0]),
    patience=st.sampled_from([0.0, 1.0, 400.0]),
    express_wait_seconds=st.sampled_from([0.0, 0.02, 1.0]),
    interruptible=st.booleans(),
)


@pytest.mark.parametrize("name", POLICIES)
@given(
    jobs=job_lists(),
    config=configs,
    layers=st.integers(1, 4),
    chaos=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_every_rule_holds(
    name: str, jobs: list[Job], config: PolicyConfig, layers: int, chaos: float, seed: int
) -> None:
    """No request is lost, run twice or given out in flight; limits, classes and sums are right;
    the device is never idle while something waits, windows of the published policies excepted (all
    of it checked by the executor)."""
    cost = CostModel(PROFILE)
    policy = name
    if name == "laps":  # it has a limit of its own for tokens
        config = replace(config, long_chunk_tokens=None)
        policy = f"laps:chunk_tokens={config.max_batch_tokens}:window_seconds={WINDOWS[seed % 3]}"
    elif name == "pla-serve":
        config = replace(config, long_chunk_tokens=None)
        window, mode = WINDOWS[seed % 3], ("deadline", "token_max")[seed % 2]
        policy = (
            f"pla-serve:chunk_tokens={config.max_batch_tokens}:mode={mode}:window={window}"
            f":window_max={max(window, 0.02)}:head_wait=0.3"
        )
    Executor(
        create_policy(policy, config, cost),
        config,
        cost,
        jobs,
        layers=layers,
        chaos=chaos,
        seed=seed,
        separate=name in ("length-aware", "laps", "pla-serve"),
        waits=name in ("length-aware", "laps", "pla-serve"),
    ).run()
