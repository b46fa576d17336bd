from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.traces.generator import KINDS, GeneratedKind, GeneratorOptions, generate_rows
from pla_serve.traces.rows import Row


def rows_of(kind: GeneratedKind, seed: int = 0, **options: Any) -> list[Row]:
    return generate_rows(kind, GeneratorOptions(**options), seed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 80), st.floats(0, 1), st.integers(0, 99))
def test_what_every_kind_keeps(kind: GeneratedKind, requests: int, share: float, seed: int) -> None:
    rows = rows_of(kind, seed, requests=requests, share=share)
    assert [row.index for row in rows] == list(range(requests))
    times = [row.arrival or 0.0 for row in rows]
    assert times[0] == 0
    assert times == sorted(times)
    alone = {"chat": 0.0, "all-short": 0.0, "documents": 1.0, "all-long": 1.0}
    assert sum(row.session is None for row in rows) == round(alone.get(kind, share) * requests)
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        if row.session is not None:
            sessions.setdefault(row.session, []).append(row)
    for turns in sessions.values():
        assert turns[0].cached_tokens == 0
        assert [row.turn for row in turns] == list(range(1, len(turns) + 1))
        for before, after in pairwise(turns):
            assert after.cached_tokens == before.input_tokens + before.output_tokens
            gap = (after.arrival or 0) - (before.arrival or 0)
            assert gap == pytest.approx(after.think, abs=1e-6)
    if kind == "all-short":
        assert all(row.input_tokens <= 256 for row in rows)
    if kind == "all-long":
        assert all(row.new_tokens > 2048 for row in rows)


def test_a_seed_is_a_workload_and_the_rate_changes_times_only() -> None:
    one = rows_of("chat+documents", requests=300, think=0.0)
    assert one == rows_of("chat+documents", requests=300, think=0.0)
    assert one != rows_of("chat+documents", 1, requests=300, think=0.0)
    slow = rows_of("chat+documents", requests=300, think=0.0, rate=0.5)
    assert [row.arrival for row in slow] == pytest.approx([2 * (row.arrival or 0) for row in one])
    assert [(row.input_tokens, row.session) for row in slow] == [
        (row.input_tokens, row.session) for row in one
    ]


def test_sizes() -> None:
    rows = rows_of("documents", requests=8000, document=3000, answer=50)
    assert np.median([row.input_tokens for row in rows]) == pytest.approx(3000, rel=0.05)
    assert np.median([row.output_tokens for row in rows]) == pytest.approx(50, rel=0.06)
    chat = rows_of("chat", requests=8000, turns=3)
    assert np.median([row.new_tokens for row in chat]) == pytest.approx(17, abs=2)
    assert len(chat) / len({row.session for row in chat}) == pytest.approx(3, rel=0.06)


@pytest.mark.parametrize("kind", ["burst-short", "burst-long"])
def test_only_the_class_named_comes_in_bursts(kind: GeneratedKind) -> None:
    rows = rows_of(kind, requests=30_000, share=0.4, turns=1, quiet=200, burst=20)
    spread = {}
    for name, documents in (("short", False), ("long", True)):
        times = np.array([row.arrival for row in rows if (row.session is None) == documents])
        assert times[-1] == pytest.approx(30_000, rel=0.03)
        counts = np.bincount((times / 10).astype(int))
        spread[name] = counts.var() / counts.mean()
    bursty = kind.removeprefix("burst-")
    assert spread.pop(bursty) > 5
    assert spread.popitem()[1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("requests", 0), ("rate", 0.0), ("rate", float("inf")), ("share", 1.1), ("turns", 0.5)),
        *(("turns", 21.0), ("think", -1.0), ("document", 0), ("answer_sigma", -1.0), ("burst", 0)),
    ],
)
def test_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        GeneratorOptions(**{field: value})
