"""Against the warpers of transformers and against an inverse CDF written with numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pla_serve.engine.sampling import draw as module
from pla_serve.engine.sampling.draw import (
    RESOLUTION,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    nucleus_floor_by_halving,
    nucleus_floor_by_sorting,
    pick,
    scale,
    to_weights,
)
from pla_serve.wire.engine import SamplingParams

seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 5)


def random_logits(seed: int, rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def surviving(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """Probabilities (n, vocab) float64 after the filters."""
    rows = len(logits)
    scaled = scale(logits.clone(), logits.amax(-1), [params.get("temperature", 1.0)] * rows)
    keep_min_p(scaled, [params.get("min_p", 0.0)] * rows)
    keep_top_k(scaled, [params.get("top_k", 0)] * rows)
    weights = to_weights(scaled)
    keep_top_p(scaled, weights, [params.get("top_p", 1.0)] * rows)
    return weights.double() / weights.double().sum(-1, keepdim=True)


def warped(logits: torch.Tensor, *warpers: Any) -> torch.Tensor:
    for warper in warpers:
        logits = warper(None, logits)
    return logits.double().softmax(-1)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # What weighs less than our resolution is 0 for us.
    visible = theirs > 4 * theirs.amax(-1, keepdim=True) / RESOLUTION
    assert ((ours > 0) | ~visible).all()
    assert ((theirs > 0) | (ours == 0)).all()
    # float32 rounds a logit of several hundred (the lowest temperature) by some 1e-5, both ways.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, vocab=st.sampled_from([3, 50, 1000]), temperature=temperatures)
def test_temperature(seed, vocab, temperature) -> None:
    logits = random_logits(seed, 3, vocab)
    expected = warped(logits, TemperatureLogitsWarper(temperature))
    assert_same(surviving(logits, temperature=temperature), expected)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, vocab=st.sampled_from([3, 50, 1000]), top_k=st.integers(1, 1200))
def test_top_k(seed, vocab, top_k) -> None:
    logits = random_logits(seed, 3, vocab)
    assert_same(surviving(logits, top_k=top_k), warped(logits, TopKLogitsWarper(top_k)))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, vocab=st.sampled_from([3, 50, 1000]), min_p=st.floats(0.001, 1))
def test_min_p(seed, vocab, min_p) -> None:
    logits = random_logits(seed, 3, vocab)
    probabilities = logits.softmax(-1)
    relative = probabilities / probabilities.amax(-1, keepdim=True)
    assume(((relative - min_p).abs() > 1e-6).all())
    assert_same(surviving(logits, min_p=min_p), warped(logits, MinPLogitsWarper(min_p)))


def on_the_edge(logits: torch.Tensor, top_p: float) -> bool:
    """Rounding decides whether a token belongs to the nucleus."""
    mass = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    return bool(((mass - top_p).abs() < 1e-5).any())


@settings(max_examples=100, deadline=None)
@given(
    seed=seeds,
    vocab=st.sampled_from([3, 50, 1000, 5000]),
    top_p=st.floats(0.01, 0.999),
    spread=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
)
def test_top_p(seed, vocab, top_p, spread) -> None:
    logits = random_logits(seed, 3, vocab, spread)
    if vocab > 50:
        logits = logits[:1]
    kept = surviving(logits, top_p=top_p)
    expected = warped(logits, TopPLogitsWarper(top_p))
    assume(not on_the_edge(logits, top_p))
    assert_same(kept, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(2, 60),
    top_p=st.floats(0.1, 0.99),
    min_p=st.floats(0.001, 0.3),
)
def test_all_filters_in_vllms_order(seed, temperature, top_k, top_p, min_p) -> None:
    logits = random_logits(seed, 1, 200)
    before = (TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p))
    scaled = logits.clone()
    for warper in (*before, TopKLogitsWarper(top_k)):
        scaled = warper(None, scaled)
    relative = (logits - logits.max()).div(temperature).exp()
    assume(not on_the_edge(scaled, top_p))
    assume(((relative - min_p).abs() > 1e-6).all())
    ours = surviving(logits, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    assert_same(ours, warped(scaled, TopPLogitsWarper(top_p)))


@settings(max_examples=50, deadline=None)
@given(seed=seeds, top_p=st.floats(0.01, 0.99), width=st.sampled_from([1, 2, 7]))
def test_a_narrow_first_sort_finds_the_same_nucleus(seed, top_p, width) -> None:
    logits = random_logits(seed, 4, 300)
    logits[1] *= 0.001  # flat: needs the widest sort
    expected = surviving(logits, top_p=top_p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nucleus_floor_by_sorting, "__defaults__", (width,))
        assert torch.equal(surviving(logits, top_p=top_p), expected)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, top_p=st.floats(0.001, 0.9999), rows=st.sampled_from([1, 3, 70]))
def test_halving_finds_the_same_nucleus_as_sorting(seed, top_p, rows) -> None:
    """Also with ties, which logits of bfloat16 have, and with one token that has all the mass."""
    logits = random_logits(seed, rows, 300).bfloat16().float()
    logits[0] *= 0.001
    logits[-1] *= 100
    expected = surviving(logits, top_p=top_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "nucleus_floor_by_sorting", nucleus_floor_by_halving)
        assert torch.equal(surviving(logits, top_p=top_p), expected)


def test_ties_stay_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0]])
    assert (surviving(logits, top_k=1) > 0).tolist() == [[True, False, True, False, False]]
    assert (surviving(logits, top_p=0.75) > 0).tolist() == [[True, True, True, True, False]]


def test_the_likeliest_token_always_stays() -> None:
    logits = random_logits(0, 2, 500)
    for extreme in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-4}):
        assert surviving(logits, **extreme).argmax(-1).tolist() == logits.argmax(-1).tolist()
        assert (surviving(logits, **extreme) > 0).sum() == 2


def oracle(weights: np.ndarray, fraction: float) -> int:
    total = np.cumsum(weights.astype(np.float64))
    return int(np.searchsorted(total, fraction * total[-1], side="right"))


@settings(max_examples=100, deadline=None)
@given(
    seed=seeds,
    vocab=st.sampled_from([1, 2, 127, 128, 129, 1000]),
    fraction=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53])),
    zeros=st.floats(0, 0.99),
)
def test_pick_is_the_inverse_cdf(seed, vocab, fraction, zeros) -> None:
    weights = to_weights(-random_logits(seed, 3, vocab).abs())
    cut = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < zeros
    cut[torch.arange(3), weights.argmax(-1)] = False
    weights = weights.masked_fill(cut, 0.0)
    picked = pick(weights, torch.full((3,), fraction, dtype=torch.float64)).tolist()
    assert picked == [oracle(row, fraction) for row in weights.numpy()]
    assert (weights[torch.arange(3), picked] > 0).all()


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = random_logits(1, 1, 20, 1.5)
    n = 20_000
    fractions = torch.arange(n, dtype=torch.float64) / n
    weights = to_weights(scale(logits.clone(), logits.amax(-1), [1.0]))
    drawn = pick(weights.expand(n, -1), fractions)
    expected = logits.double().softmax(-1)[0]
    # Evenly spaced fractions hit each token in proportion, give or take one.
    assert (torch.bincount(drawn, minlength=20) - n * expected).abs().max() <= 1.001


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=seeds)
def test_a_row_is_drawn_alike_in_any_company(data, seed) -> None:
    params = st.builds(
        SamplingParams,
        max_tokens=st.just(1),
        temperature=st.floats(0.01, 3),
        top_k=st.sampled_from([0, 1, 5, 400]),
        top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.1]),
    )
    rows = data.draw(st.lists(params, min_size=1, max_size=6))
    fractions = [math.fmod(0.1 + 0.618 * at, 1.0) for at in range(len(rows))]
    logits = random_logits(seed, len(rows), 300)
    peak = logits.amax(-1)
    together = draw(logits.clone(), peak, rows, fractions).tolist()
    alone = [
        int(draw(logits[i : i + 1].clone(), peak[i : i + 1], rows[i : i + 1], fractions[i : i + 1]))
        for i in range(len(rows))
    ]
    assert together == alone
