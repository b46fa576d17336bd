"""Waits take a bounded part of the time, and no tenant uses up what others have not asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.sampling.wait_budget import WaitBudget

SHARE, BURST = 0.05, 0.01
moves = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 0.2), st.floats(0, 1)), min_size=1, max_size=80
)


@given(moves)
def test_the_waits_of_all_together_are_bounded_over_any_stretch(
    steps: list[tuple[str, float, float]],
) -> None:
    budget, now = WaitBudget(SHARE, BURST), 0.0
    spent: list[tuple[float, float]] = []
    for tenant, pause, part in steps:
        now += pause
        begin, seconds = now, part * budget.granted(tenant, now)
        now += seconds
        budget.spend([tenant], seconds, now)
        spent.append((begin, seconds))
        for since, _ in spent:
            total = sum(s for at, s in spent if at >= since)
            assert total <= BURST + SHARE * (now - since) + 1e-9


@given(moves)
def test_a_tenant_that_has_not_waited_is_granted_something_whatever_one_other_did(
    steps: list[tuple[str, float, float]],
) -> None:
    """The other one uses half of the share, so the bucket of all does not stay empty."""
    budget, now = WaitBudget(SHARE, BURST), 0.0
    for _, pause, _ in steps:
        now += pause
        seconds = budget.granted("greedy", now)
        now += seconds
        budget.spend(["greedy"], seconds, now)
    for _ in range(40):  # half a burst is filled in 0.2 s
        now += 0.01
        seconds = budget.granted("greedy", now)
        budget.spend(["greedy"], seconds, now)
    assert budget.granted("quiet", now) >= 0.4 * BURST


def test_time_refills_it_and_tenants_are_forgotten() -> None:
    budget = WaitBudget(SHARE, BURST)
    assert budget.granted("a", 0.0) == BURST
    budget.spend(["a"], BURST, 0.0)
    assert budget.granted("a", 0.0) == 0.0
    assert budget.granted("b", 0.0) == 0.0, "all of it is spent"
    assert budget.granted("b", 0.1) > 0.0
    assert budget.granted("a", 10.0) == BURST
    assert not budget._tenants
