from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.sampling.rowmax import BLOCK, row_max


@settings(deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 5 * BLOCK),
    distinct=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_equals_argmax_with_its_first_index_on_ties(rows, vocab, distinct, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-distinct, distinct, (rows, vocab), generator=generator).to(dtype)
    values, indices = row_max(logits)
    assert indices.tolist() == logits.argmax(-1).tolist()
    assert values.tolist() == logits.amax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 200, 2 * BLOCK, 2 * BLOCK + 4])
def test_nan_and_infinity_show_in_the_value(bad: float, place: int) -> None:
    logits = torch.zeros(3, 2 * BLOCK + 5)
    logits[1, place] = bad
    values, _ = row_max(logits)
    assert values.isfinite().tolist() == [True, False, True]
