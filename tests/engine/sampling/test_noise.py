from __future__ import annotations

import pytest

from pla_serve.engine.sampling.noise import seed_key, uniform


def test_numbers_are_the_same_in_every_release() -> None:
    key = seed_key(42, default_seed=7, request_id="a")
    expected = [0.14182007223715964, 0.9099802305944442, 0.5719761986830266]
    assert [uniform(key, n) for n in range(3)] == expected


def test_only_the_seed_counts_where_one_is_given() -> None:
    one = seed_key(3, default_seed=0, request_id="a")
    assert one == seed_key(3, default_seed=1, request_id="b")
    assert one != seed_key(4, default_seed=0, request_id="a")


def test_without_a_seed_default_and_id_count() -> None:
    one = seed_key(None, default_seed=0, request_id="a")
    assert one == seed_key(None, default_seed=0, request_id="a")
    assert one != seed_key(None, default_seed=1, request_id="a")
    assert one != seed_key(None, default_seed=0, request_id="b")


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 10**40])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= uniform(seed_key(seed, default_seed=0, request_id=""), 0) < 1


def test_numbers_spread_over_the_interval() -> None:
    key = seed_key(0, default_seed=0, request_id="")
    tenths = [0] * 10
    for n in range(10_000):
        tenths[int(10 * uniform(key, n))] += 1
    # Fixed numbers, so this cannot flicker; 5 standard deviations are 150.
    assert all(850 < count < 1150 for count in tenths)
