from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.bench.workload import BenchWorkload, Mix, WorkloadConfig, generate


def shapes(workload: BenchWorkload) -> list[Any]:
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
