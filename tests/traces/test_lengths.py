from __future__ import annotations

import random

import numpy as np
import pytest

from pla_serve.traces.lengths import ChatLengths, Lmsys, Lognormal, Uniform


def test_messages_have_the_sizes_of_lmsys() -> None:
    rng = random.Random(2)
    sizes = [Lmsys(high=100_000).sample(rng) for _ in range(20_000)]
    p10, p50, p90, p99 = np.percentile(sizes, [10, 50, 90, 99])
    assert p10 == pytest.approx(6, abs=1.5)
    assert p50 == pytest.approx(17, abs=2)
    assert p90 == pytest.approx(120, rel=0.25)
    assert p99 == pytest.approx(1200, rel=0.3)
    assert np.mean(np.array(sizes) <= 256) == pytest.approx(0.947, abs=0.01)


def test_a_lognormal_has_its_median_and_spread() -> None:
    rng = random.Random(4)
    sizes = [Lognormal(4000, 0.8).sample(rng) for _ in range(10_000)]
    p50, p90 = np.percentile(sizes, [50, 90])
    assert p50 == pytest.approx(4000, rel=0.05)
    assert p90 == pytest.approx(4000 * np.exp(1.2816 * 0.8), rel=0.06)
    clipped = [Lognormal(4000, 0.8, low=3000, high=5000).sample(rng) for _ in range(500)]
    assert (min(clipped), max(clipped)) == (3000, 5000)


def test_conversations() -> None:
    rng = random.Random(5)
    lengths = ChatLengths(answer=Uniform(7, 9), mean_turns=3, max_turns=100, think_seconds=2)
    sessions = [lengths.session(rng) for _ in range(4000)]
    assert np.mean([len(s) for s in sessions]) == pytest.approx(3, rel=0.06)
    assert all(s[0].think == 0 for s in sessions)
    assert np.mean([m.think for s in sessions for m in s[1:]]) == pytest.approx(2, rel=0.06)
    assert {m.answer_tokens for s in sessions for m in s} == {7, 8, 9}
    assert max(len(ChatLengths(max_turns=2).session(rng)) for _ in range(200)) == 2


def test_out_of_range() -> None:
    for make in (
        lambda: Lognormal(0, 1),
        lambda: Lognormal(10, -1),
        lambda: Lognormal(10, 1, low=9, high=3),
        lambda: ChatLengths(mean_turns=0.5),
        lambda: ChatLengths(think_seconds=-1),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            make()
