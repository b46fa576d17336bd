from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.bench.workload import (
    LengthDistribution,
    Mix,
    Workload,
    WorkloadConfig,
    arrivals,
    generate,
)


def shapes(workload: Workload) -> list[Any]:
    return [session.turns for session in workload.sessions]


@settings(max_examples=50, deadline=None)
@given(
    mix=st.sampled_from(["chat+documents", "chat", "documents"]),
    requests=st.integers(1, 120),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    mean_turns=st.floats(1, 6),
)
def test_counts_are_exact_and_ids_unique(
    mix: Mix, requests: int, share: float, seed: int, mean_turns: float
) -> None:
    config = WorkloadConfig(
        mix=mix, requests=requests, document_share=share, seed=seed, mean_turns=mean_turns
    )
    workload = generate(config)

    kinds = Counter(turn.kind for turn in workload.turns)
    documents = {"chat": 0, "documents": requests}.get(mix, round(share * requests))
    assert workload.requests == requests
    assert kinds["document"] == documents
    assert len({turn.id for turn in workload.turns}) == requests
    assert all(1 <= len(session.turns) <= config.max_turns for session in workload.sessions)
    for turn in workload.turns:
        assert turn.new_tokens == sum(piece.tokens for piece in turn.pieces)
        low, high = config.document_tokens if turn.kind == "document" else (2, 2048)
        assert low <= turn.new_tokens <= high
        assert 16 <= turn.max_tokens <= 48


def test_a_seed_is_a_workload_and_the_rate_changes_times_only() -> None:
    config = WorkloadConfig(requests=60)
    one, slow = generate(config), generate(replace(config, rate=0.5))

    assert generate(config) == one
    assert shapes(generate(replace(config, seed=1))) != shapes(one)
    assert shapes(slow) == shapes(one)
    assert [session.start for session in slow.sessions] == pytest.approx(
        [2 * session.start for session in one.sessions]
    )


def test_requests_come_at_the_rate() -> None:
    workload = generate(WorkloadConfig(requests=4000, rate=8.0))
    assert workload.requests / workload.sessions[-1].start == pytest.approx(8.0, rel=0.1)


@given(st.integers(1, 60), st.floats(0.1, 100), st.integers(1, 7), st.integers(0, 99))
def test_bursts(count: int, rate: float, burst: int, seed: int) -> None:
    times = arrivals(count, rate, burst, random.Random(seed))
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] == 0
    sizes = [times.count(time) for time in dict.fromkeys(times)]
    assert all(size == burst for size in sizes[:-1])
    assert sizes[-1] <= burst


def test_arrivals_are_poisson() -> None:
    gaps = np.array([b - a for a, b in pairwise(arrivals(5000, 3.0, 1, random.Random(1)))])
    assert gaps.mean() == pytest.approx(1 / 3, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.06)


def test_messages_have_the_sizes_of_lmsys() -> None:
    rng = random.Random(2)
    sizes = [LengthDistribution(high=100_000).sample(rng) for _ in range(20_000)]
    p10, p50, p90, p99 = np.percentile(sizes, [10, 50, 90, 99])
    assert p10 == pytest.approx(6, abs=1.5)
    assert p50 == pytest.approx(17, abs=2)
    assert p90 == pytest.approx(120, rel=0.25)
    assert p99 == pytest.approx(1200, rel=0.3)
    assert np.mean(np.array(sizes) <= 256) == pytest.approx(0.947, abs=0.01)


def test_the_mean_number_of_turns() -> None:
    workload = generate(WorkloadConfig(mix="chat", requests=6000, mean_turns=3.0, max_turns=100))
    assert workload.requests / len(workload.sessions) == pytest.approx(3.0, rel=0.06)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requests", 0),
        ("rate", 0.0),
        ("rate", float("inf")),
        ("burst", 0),
        ("document_share", 1.5),
        ("mean_turns", 0.5),
        ("mean_turns", 9.0),
        ("think_seconds", -1.0),
        ("document_tokens", (10, 5)),
        ("output_tokens", (0, 5)),
    ],
)
def test_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        WorkloadConfig(**{field: value})
