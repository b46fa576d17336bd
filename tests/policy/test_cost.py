"""The cost model finds the truth, keeps it, and follows it when it changes."""

from __future__ import annotations

import random
from dataclasses import astuple, replace
from itertools import pairwise
from math import inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.boundary import crossing
from pla_serve.policy.cost import (
    LEAST_BOUNDARY,
    MOST_BOUNDARY,
    REFIT_EVERY,
    CostModel,
    CostProfile,
    work_of,
)
from pla_serve.policy.fit import SAMPLES_PER_STRATUM, STRATA, SampleWindow
from pla_serve.policy.protocol import Batch, BatchClass, Chunk

TRUTH = CostProfile(2e-4, 3e-8, 2e-7, 1e-4, 8e-3)
ACCELERATOR = CostProfile(8.7e-5, 1.8e-9, 6.8e-8, 0.0, 0.0172)
"""An H200 with a model of 32B parameters."""
WRONG = CostProfile(1e-3, 1e-8, 1e-6, 1e-3, 1e-1)


def prefill(*chunks: tuple[int, int]) -> Batch:
    parts = (Chunk(str(n), tokens, history) for n, (tokens, history) in enumerate(chunks))
    return Batch(BatchClass.MIXED, tuple(parts))


def decode(requests: int, context: int) -> Batch:
    steps = tuple(Chunk(str(n), 1, context) for n in range(requests))
    return Batch(BatchClass.DECODE, (), steps)


def some_batch(draw: random.Random) -> Batch:
    kind = draw.choice(["short", "long", "decode"])
    if kind == "short":
        return prefill(*((draw.randint(1, 200), draw.choice([0, 900, 3000])) for _ in range(5)))
    if kind == "long":
        return prefill((512, 512 * draw.randint(0, 15)))
    return decode(draw.randint(1, 32), draw.randint(10, 3000))


def feed(
    model: CostModel, truth: CostProfile, samples: int, seed: int = 0, noise: float = 0.0
) -> None:
    exact, draw = CostModel(truth), random.Random(seed)
    for _ in range(samples):
        batch = some_batch(draw)
        model.observe(batch, exact.seconds(batch) * draw.uniform(1 - noise, 1 + noise))


def worst_error(model: CostModel, truth: CostProfile) -> float:
    exact = CostModel(truth)
    probes = [prefill((64, 0)), prefill((512, 4096)), decode(8, 1000), prefill((100, 0), (50, 900))]
    return max(abs(model.seconds(b) / exact.seconds(b) - 1) for b in probes)


class TestWork:
    def test_sums_over_chunks(self) -> None:
        chunks = (Chunk("a", 10, 100), Chunk("b", 4, 0))
        batch = Batch(BatchClass.SHORT, chunks, (Chunk("c", 1, 50),))
        work = work_of(batch)
        assert work == (15, 10 * 105 + 4 * 2 + 1 * 50.5, 110 + 4 + 51, 3, 1)
        assert CostModel(TRUTH).seconds(batch) == pytest.approx(
            sum(unit * amount for unit, amount in zip(astuple(TRUTH), work, strict=True))
        )

    @given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 600))
    def test_a_prefill_in_equal_chunks_costs_what_its_batches_cost(
        self, tokens: int, history: int, parts: int
    ) -> None:
        tokens *= parts  # so that chunks are equal
        model = CostModel(TRUTH)
        chunk = tokens // parts
        batches = sum(
            model.seconds(prefill((chunk, history + done))) for done in range(0, tokens, chunk)
        )
        assert model.prefill_seconds(tokens, history, chunk) == pytest.approx(batches)


class TestFit:
    def test_finds_the_truth_from_a_wrong_start(self) -> None:
        model = CostModel(WRONG)
        assert worst_error(model, TRUTH) > 1
        feed(model, TRUTH, 300, noise=0.05)
        assert worst_error(model, TRUTH) < 0.05
        assert model.error() < 0.05

    def test_a_few_samples_of_a_warm_up_are_enough_to_start(self) -> None:
        model = CostModel(WRONG)
        feed(model, TRUTH, 16)
        assert worst_error(model, TRUTH) < 0.3

    def test_outliers_are_shrugged_off(self) -> None:
        model, exact, draw = CostModel(WRONG), CostModel(TRUTH), random.Random(1)
        for number in range(600):
            batch = some_batch(draw)
            factor = 20.0 if number % 10 == 0 else 0.1 if number % 10 == 5 else 1.0
            model.observe(batch, exact.seconds(batch) * factor)
        assert worst_error(model, TRUTH) < 0.1

    def test_follows_the_clock(self) -> None:
        model = CostModel(WRONG)
        feed(model, TRUTH, 600)
        slower = CostProfile(*(3 * unit for unit in astuple(TRUTH)))
        feed(model, slower, 120, seed=1)
        assert worst_error(model, slower) < 0.15, "soon, because the error calls for a fit"

    def test_remembers_long_prefills_through_a_night_of_decoding(self) -> None:
        model, exact = CostModel(WRONG), CostModel(TRUTH)
        feed(model, TRUTH, 300)
        for _ in range(3000):
            batch = decode(4, 500)
            model.observe(batch, exact.seconds(batch))
        assert worst_error(model, TRUTH) < 0.05

    @pytest.mark.parametrize("seed", range(8))
    def test_prefills_keep_their_price_while_a_busy_machine_only_decodes(self, seed: int) -> None:
        """Others take the cores now and then, so its clock changes all the time. One sequence that
        grows says nothing of attention and KV but their sum."""
        draw, model, exact = random.Random(seed), CostModel(WRONG), CostModel(TRUTH)
        feed(model, TRUTH, 300, seed, noise=0.05)
        steps = [decode(1, context) for context in range(16, 600)]
        clock, left = 1.0, 0
        for batch in steps:
            if left == 0:
                clock, left = draw.choice([1.0, 1.0, 1.0, 1.4, 2.0]), draw.randint(10, 60)
            left -= 1
            model.observe(batch, exact.seconds(batch) * clock * draw.uniform(0.95, 1.05))
        for batch in (prefill((256, 0)), prefill((1024, 0)), prefill((2048, 0))):
            assert 0.5 < model.seconds(batch) / exact.seconds(batch) < 5.0, "and not a hundred"

    @pytest.mark.parametrize("extra", [3e-4, 1e-3, 3e-3])
    def test_what_small_batches_take_too_long_is_not_multiplied_in_a_document(
        self, extra: float
    ) -> None:
        """On an accelerator that does as its data sheet says, but for the host's time, the first
        batches of a server are small."""
        model, exact = CostModel(ACCELERATOR), CostModel(ACCELERATOR)
        document = prefill((2048, 0))
        small = [prefill((16, 0)), *(decode(1, 16 + n) for n in range(3))]
        small += [prefill((64, 0)), *(decode(1, 64 + n) for n in range(3))]
        small += [prefill((256, 0)), *(decode(1, 256 + n) for n in range(3))]
        for batch in small:
            model.observe(batch, exact.seconds(batch) + extra)
            assert 0.7 < model.seconds(document) / exact.seconds(document) < 1.5

    @pytest.mark.parametrize("times", [0.02, 1000.0])
    def test_a_wrong_price_of_attention_is_mended_by_the_first_long_prompts(
        self, times: float
    ) -> None:
        """Few samples among many of decoding, which fit well: they must not count as outliers."""
        wrong = replace(ACCELERATOR, per_attention=times * ACCELERATOR.per_attention)
        model, exact = CostModel(wrong), CostModel(ACCELERATOR)
        batches = [decode(4, 100 + n) for n in range(600)]
        batches[10:300:20] = [prefill((2048, 2048 * (n % 4))) for n in range(15)]
        for batch in batches:
            model.observe(batch, exact.seconds(batch))
        for batch in (prefill((2048, 0)), prefill((2048, 6144))):
            assert model.seconds(batch) == pytest.approx(exact.seconds(batch), rel=0.1)

    @given(st.lists(st.tuples(st.integers(1, 4000), st.floats(1e-6, 1e3)), min_size=8, max_size=40))
    def test_never_negative_whatever_is_measured(self, samples: list[tuple[int, float]]) -> None:
        model = CostModel(TRUTH)
        for tokens, seconds in samples:
            model.observe(prefill((tokens, tokens // 2)), seconds)
        assert all(isfinite(unit) and unit >= 0 for unit in astuple(model.profile))

    def test_is_rare(self) -> None:
        """Between two fits the coefficients stand still."""
        model = CostModel(TRUTH)
        profiles = []
        for number in range(4 * REFIT_EVERY):
            feed(model, TRUTH, 1, seed=number, noise=0.1)
            profiles.append(model.profile)
        changes = sum(a is not b for a, b in pairwise(profiles))
        assert 4 <= changes <= 10

    @pytest.mark.parametrize("seconds", [0.0, -1.0, nan, inf])
    def test_times_that_say_nothing_are_skipped(self, seconds: float) -> None:
        model = CostModel(TRUTH)
        for _ in range(50):
            model.observe(prefill((10, 0)), seconds)
            model.observe(Batch(BatchClass.MIXED), 1.0)
        assert model.profile == TRUTH
        assert model.error() == 0.0

    def test_window_is_bounded(self) -> None:
        window, draw = SampleWindow(), random.Random(0)
        for _ in range(20_000):
            work = work_of(prefill((2 ** draw.randint(0, 18), 2 ** draw.randint(0, 20))))
            window.add(work, 1.0, int(work.tokens), int(work.kv))
        features, seconds, weights = window.samples()
        assert features.shape == (len(seconds), 5)
        assert len(seconds) == len(weights) <= STRATA * SAMPLES_PER_STRATUM

    def test_error_is_the_median_of_the_last_ones(self) -> None:
        model = CostModel(CostProfile(1.0, 0, 0, 0, 0))
        for seconds in (10.0, 20.0, 5.0):
            model.observe(prefill((10, 0)), seconds)
        assert model.error() == pytest.approx(0.5)


class TestEpoch:
    def test_orders_are_priced_alike_until_the_world_changes(self) -> None:
        model = CostModel(TRUTH)
        before = model.epoch_prefill_seconds(900, 0, 512)
        feed(model, TRUTH, 200, noise=0.1)
        assert model.profile != TRUTH
        assert model.epoch == 0
        assert model.epoch_prefill_seconds(900, 0, 512) == before
        feed(model, CostProfile(*(2 * unit for unit in astuple(TRUTH))), 400)
        assert model.epoch >= 1
        assert model.epoch_prefill_seconds(900, 0, 512) == pytest.approx(2 * before, rel=0.25)


class TestBoundary:
    coefficient = st.floats(1e-9, 1e-2)

    @given(coefficient, coefficient, coefficient, st.floats(1e-6, 1), st.integers(0, 100_000))
    def test_compute_equals_memory_there(
        self, token: float, attention: float, kv: float, fixed: float, history: int
    ) -> None:
        length = crossing(history, token, attention, kv, fixed)
        compute = token * length + attention * length * (history + length / 2)
        memory = fixed + kv * (history + length)
        assert compute == pytest.approx(memory, rel=1e-6)

    @given(st.floats(1e-9, 1e-6), st.floats(1e-6, 1e-3), st.integers(1, 100_000))
    def test_agrees_with_the_published_form(self, alpha: float, gamma_r: float, h: int) -> None:
        """L_m = [g_w - b - 2aH + sqrt((2aH + b - g_w)^2 + 4 a g_r H)] / 2a, b > g_w, no launch."""
        excess = 1e-4
        root = ((2 * alpha * h + excess) ** 2 + 4 * alpha * gamma_r * h) ** 0.5
        published = (root - excess - 2 * alpha * h) / (2 * alpha)
        # alpha L (L + 2H) is per_attention L (H + L/2); gamma_r reads H only, so take L's KV off
        ours = crossing(h, excess + gamma_r, 2 * alpha, gamma_r, 0.0)
        assert ours == pytest.approx(published, rel=1e-3, abs=1e-3)

    def test_without_attention_and_without_end(self) -> None:
        assert crossing(0, 1e-3, 0, 0, 0.2) == pytest.approx(200)
        assert crossing(0, 1e-6, 0, 1e-3, 0.2) == inf

    def test_is_clamped(self) -> None:
        assert CostModel(CostProfile(1, 0, 0, 0, 0)).boundary() == LEAST_BOUNDARY
        assert CostModel(CostProfile(0, 0, 0, 0, 1)).boundary() == MOST_BOUNDARY
        assert CostModel(CostProfile(1e-3, 0, 0, 0, 0.4)).boundary() == 400

    def test_grows_with_history(self) -> None:
        model = CostModel(CostProfile(1e-3, 1e-8, 1e-4, 0, 0.3))
        assert model.boundary(0) < model.boundary(1000) < model.boundary(3000)

    def test_does_not_flicker(self) -> None:
        """Noise moves the fit all the time, but the class of a request only with the machine."""
        truth = CostProfile(1e-3, 1e-8, 1e-7, 1e-4, 0.4)
        model = CostModel(truth)
        seen = set()
        for number in range(3000):
            feed(model, truth, 1, seed=number, noise=0.1)
            if number > 100:  # the first fits may correct what it started from
                seen.add(model.boundary(0))
        assert len(seen) == 1
        assert seen.pop() == pytest.approx(400, rel=0.25)
        feed(model, replace(truth, per_launch=0.8), 1500, noise=0.02)
        assert model.boundary(0) == pytest.approx(800, rel=0.1)


class TestProfile:
    @pytest.mark.parametrize("value", [-1e-9, nan, inf])
    def test_bad_coefficients_are_named(self, value: float) -> None:
        with pytest.raises(ValueError, match="per_kv"):
            CostProfile(per_kv=value)

    def test_roofline(self) -> None:
        profile = CostProfile.roofline(
            parameters=1e9,
            weight_bytes=2e9,
            attention_width=2048,
            layers=16,
            kv_bytes_per_token=65_536,
            flops=1e12,
            bytes_per_second=1e11,
            launch_seconds=1e-3,
        )
        assert profile.per_token == pytest.approx(2e-3)
        assert profile.per_attention == pytest.approx(4 * 16 * 2048 / 1e12)
        assert profile.per_kv == pytest.approx(65_536 / 1e11)
        assert profile.per_launch == pytest.approx(0.021)
        with pytest.raises(ValueError, match="flops"):
            CostProfile.roofline(
                parameters=1,
                weight_bytes=1,
                attention_width=1,
                layers=1,
                kv_bytes_per_token=1,
                flops=0,
                bytes_per_second=1,
                launch_seconds=0,
            )


def test_bulk_learns_what_a_launch_adds_to_large_batches() -> None:
    """On a machine that reads weights in 20 ms, and computes a token in 1 ms meanwhile."""
    cost = CostModel(CostProfile(1e-3, 0, 0, 0, 1e-2))
    rng = random.Random(0)
    for _ in range(600):
        tokens = rng.choice((1, 2, 4, 8, 64, 128, 256, 512, 2048))
        batch = Batch(BatchClass.LONG, (Chunk("a", tokens, 0),))
        cost.observe(batch, max(0.020, tokens * 1e-3) + 0.002)
    assert cost.bulk.per_launch + cost.bulk.per_sequence < 0.006
    assert cost.work_seconds(1, 0.5, 1, 1, 1) > 0.015
    fresh = CostModel()
    assert fresh.bulk == fresh.profile
