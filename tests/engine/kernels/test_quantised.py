"""Products with quantised weights at every level, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pla_serve.engine.kernels.quantised import Quantised, QuantisedMatrices
from pla_serve.engine.layers.cpu import FusedRMSNorm
from pla_serve.engine.loading.formats import FORMATS, WeightFormat
from tests.engine.levels import NAMES, kernels_of
from tests.engine.quantised import floats_of, rows_of

INPUTS = 512
ERROR = 6e-5
"""Of the largest output: inputs are rounded to 16 bits."""


@pytest.fixture(scope="module", params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Quantised:
    found = kernels_of(request.param).quantised
    assert found is not None
    return found


def matrix(form: WeightFormat, outputs: int, seed: int = 0) -> tuple[Any, torch.Tensor]:
    weights = np.random.default_rng(seed).standard_normal((outputs, INPUTS)) * 0.05
    rows = rows_of(form, weights, seed)
    return (form, rows), torch.from_numpy(floats_of(form, rows)).double()


def near(got: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((got - exact).abs().max() <= ERROR * exact.abs().max())


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_products(kernels: Quantised, form: WeightFormat, tokens: int) -> None:
    made, weights = matrix(form, 75)  # no multiple of the kernels' 16 and 32
    inputs = torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(tokens))
    got = kernels.linear(inputs, QuantisedMatrices([made], INPUTS), None)
    assert near(got, inputs.double() @ weights.t())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_rows_are_those_of_the_format(kernels: Quantised, form: WeightFormat) -> None:
    made, weights = matrix(form, 20)
    ids = torch.tensor([19, 0, 7, 7])
    got = kernels.rows(QuantisedMatrices([made], INPUTS), ids)
    torch.testing.assert_close(got.double(), weights[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5, 70, 800])
def test_what_comes_before_and_after(kernels: Quantised, tokens: int, threads: int) -> None:
    parts, weights = zip(*(matrix(form, 48, n) for n, form in enumerate(FORMATS)), strict=True)
    ups, gates = QuantisedMatrices(parts, INPUTS), QuantisedMatrices(parts[::-1], INPUTS)
    up, gate = torch.cat(weights), torch.cat(weights[::-1])
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, INPUTS, generator=generator) * 3
    bias, other = torch.randn(len(up), generator=generator), torch.randn(tokens, len(up))
    norm = FusedRMSNorm(torch.rand(INPUTS, generator=generator) + 0.5, 1e-5)
    product = inputs.double() @ up.t() + bias
    normed = torch.nn.functional.rms_norm(inputs.double(), [INPUTS], norm.weight.double(), 1e-5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert near(kernels.linear(inputs, ups, bias), product)
        silu = torch.nn.functional.silu
        assert near(kernels.linear(inputs, ups, bias, "swish"), silu(product))
        assert near(kernels.linear(inputs, ups, bias, "add", other), product + other)
        assert near(kernels.linear(inputs, ups, bias, "mul", other), product * other)
        gated = normed @ up.t() * silu(normed @ gate.t())
        assert near(kernels.linear(inputs, ups, None, gate=gates, norm=norm), gated)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [8, 50])
def test_a_row_does_not_depend_on_the_others(kernels: Quantised, tokens: int) -> None:
    made, _ = matrix(FORMATS[0], 64)
    weights = QuantisedMatrices([made], INPUTS)
    inputs = torch.randn(tokens, INPUTS)
    together = kernels.linear(inputs, weights, None)
    alone = torch.cat([kernels.linear(row[None], weights, None) for row in inputs])
    if tokens <= 8:
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(kernels: Quantised, tokens: int, odd: float) -> None:
    made, _ = matrix(FORMATS[0], 64)
    inputs = torch.randn(tokens, INPUTS)
    inputs[1, 100] = odd
    got = kernels.linear(inputs, QuantisedMatrices([made], INPUTS), None)
    assert not got[1].isfinite().any()
    assert got[0].isfinite().all()


def test_levels_agree() -> None:
    """Sums of integers are exact, so that only the order of few float sums can differ."""
    made, _ = matrix(FORMATS[5], 64)
    weights, inputs = QuantisedMatrices([made], INPUTS), torch.randn(40, INPUTS)
    found = [kernels_of(name).quantised for name in NAMES if name != "amx"]
    results = [kernels.linear(inputs, weights, None) for kernels in found if kernels is not None]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)
