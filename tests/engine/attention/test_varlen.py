"""Our calls of ``varlen_attn``, on a function that computes what torch documents."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.attention import varlen
from pla_serve.engine.attention.varlen import VarlenAttention, varlen_missing
from tests.engine.attention.problems import make_problem


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Keys and values are (pages, page size, kv heads, dim); rows beyond ``cu_seq_q`` stay NaN."""
    assert cu_seq_k is None
    assert window_size == (-1, 0), "causal"
    assert enable_gqa
    assert {t.dtype for t in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    heads = query.shape[1]
    output = torch.full(query.shape, torch.nan, dtype=query.dtype)
    for i, context in enumerate(seqused_k.tolist()):
        start, end = cu_seq_q[i : i + 2].tolist()
        assert end - start <= max_q
        assert context <= max_k
        if start == end:
            continue
        pages = block_table[i, : -(-context // key.shape[1])].long()
        keys, values = (
            memory[pages].flatten(0, 1)[:context].repeat_interleave(heads // memory.shape[2], 1)
            for memory in (key, value)
        )
        scores = torch.einsum("thd,shd->hts", query[start:end].double(), keys.double()) * scale
        seen = torch.ones(end - start, context, dtype=torch.bool).tril(context - (end - start))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        output[start:end] = torch.einsum("hts,shd->thd", weights, values.double()).to(query.dtype)
    return output


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(
        st.tuples(st.sampled_from((1, 2, 5, 17)), st.sampled_from((0, 1, 3, 31))),
        min_size=1,
        max_size=4,
    ),
    group=st.sampled_from((1, 7)),
    padding=st.sampled_from(((0, 0), (5, 2))),
)
def test_equals_float64(
    seed: int, lengths: list[tuple[int, int]], group: int, padding: tuple[int, int]
) -> None:
    problem = make_problem(seed, lengths, group=group, padding=padding)
    got = VarlenAttention(attend).attend(0, problem.query, problem.cache, problem.batch, 0.25)
    torch.testing.assert_close(
        got[: problem.real].double(), problem.expected(0.25), rtol=1e-5, atol=1e-5
    )


def test_the_table_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = varlen.rectangle
    monkeypatch.setattr(varlen, "rectangle", lambda batch: made.append(batch) or original(batch))
    backend = VarlenAttention(attend)
    outer, express = make_problem(1, [(5, 3)]), make_problem(2, [(2, 9), (1, 1)])
    for problem in (outer, outer, express, outer, outer):
        got = backend.attend(0, problem.query, problem.cache, problem.batch, 0.25)
        torch.testing.assert_close(got.double(), problem.expected(0.25), rtol=1e-5, atol=1e-5)
    assert made == [outer.batch, express.batch, outer.batch]


def test_our_call_fits_the_real_signature() -> None:
    if reason := varlen_missing():
        pytest.skip(reason)
    from torch.nn.attention.varlen import varlen_attn

    theirs = inspect.signature(varlen_attn)
    ours = inspect.signature(attend).parameters.values()
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    bound = theirs.bind(*positional, **{p.name: None for p in ours if p.kind is p.KEYWORD_ONLY})
    names = list(bound.arguments)[: len(positional)]
    assert names == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
