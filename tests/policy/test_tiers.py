from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import LOOSE_TARGET
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.longs import BULK_PATIENCE
from pla_serve.policy.protocol import BatchClass, ServiceLevel
from pla_serve.policy.tiers import (
    MOST_TIERS,
    Tier,
    TierShare,
    parse_tier,
    parse_tier_share,
    tiers_by_name,
)
from tests.policy.driving import CONFIG, PROFILE, add, make, names, run
from tests.policy.executor import Executor, Job


def test_targets_have_units() -> None:
    assert parse_tier("interactive:ttft=300ms,tpot=40ms") == Tier("interactive", 0.3, 0.04)
    assert parse_tier("agent:tpot=0.1s") == Tier("agent", None, 0.1)
    assert parse_tier("batch") == Tier("batch")


def test_a_tier_without_targets_is_bulk_work_with_a_loose_pace() -> None:
    bulk, slow = parse_tier("batch"), parse_tier("slow:tpot=30s")
    assert (bulk.service, bulk.token_target) == (ServiceLevel.BULK, LOOSE_TARGET)
    assert (slow.service, slow.token_target) == (ServiceLevel.PROMISED, 30.0)
    assert parse_tier("quick:ttft=1s").token_target is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot name a tier"),
        ("auto", "is not auto"),
        ("Interactive", "lower-case"),
        ("a" * 33, "cannot name"),
        ("a b:ttft=1s", "cannot name"),
        ("a:", "no target ''"),
        ("a:ttft", "ttft of tier a is a duration"),
        ("a:ttft=300", "with its unit"),
        ("a:ttft=-1s", "with its unit"),
        ("a:ttft=nan s", "with its unit"),
        ("a:ttft=1s,ttft=2s", "two targets ttft"),
        ("a:itl=1s", "no target 'itl'"),
        ("a:tpot=0.1ms", "must lie between"),
        ("a:tpot=2000s", "must lie between"),
        ("a:ttft=99999999s", "must lie between"),
    ],
)
def test_what_is_wrong_is_said(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_tier(text)


def test_names_are_told_apart_and_few() -> None:
    assert list(tiers_by_name(["a:ttft=1s", "b"])) == ["a", "b"]
    with pytest.raises(ValueError, match="two tiers are named a"):
        tiers_by_name(["a", "a:ttft=1s"])
    with pytest.raises(ValueError, match="too many"):
        tiers_by_name([f"t{number}" for number in range(MOST_TIERS + 1)])


def test_shares_of_a_workload() -> None:
    assert parse_tier_share("a:share=0.25,ttft=1s") == TierShare(Tier("a", 1.0), 0.25)
    assert parse_tier_share("b") == TierShare(Tier("b"), 1.0)
    for text in ("a:share=0", "a:share=inf", "a:share=x", "a:share=1,share=2", "a:share=nan"):
        with pytest.raises(ValueError, match="share"):
            parse_tier_share(text)
    with pytest.raises(ValueError, match="no target 'share'"):
        parse_tier("a:share=0.5")


@given(
    st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True).filter(lambda name: name != "auto"),
    st.none() | st.integers(1, 10**6).map(lambda ms: ms / 1000),
    st.none() | st.integers(1, 10**6).map(lambda ms: ms / 1000),
)
def test_text_is_read_back(name: str, ttft: float | None, tpot: float | None) -> None:
    read = parse_tier(str(Tier(name, ttft, tpot)))
    assert read.name == name
    for found, meant in ((read.ttft, ttft), (read.tpot, tpot)):
        assert found == (None if meant is None else pytest.approx(meant, rel=1e-5))


class TestBulkWork:
    def test_short_prompts_of_it_share_batches_that_others_interrupt(self) -> None:
        policy = make()
        for number in range(4):
            add(policy, f"bulk{number}", 100, service=ServiceLevel.BULK)
        batch = run(policy, 0.0)
        assert batch.kind is BatchClass.LONG
        add(policy, "quick", 50, 0.01)
        assert names(policy.at_layer_boundary(0.01, batch)) == ["quick"]

    def test_it_lets_all_others_pass_for_its_patience_and_not_longer(self) -> None:
        for age, first in ((BULK_PATIENCE - 60, "usual"), (BULK_PATIENCE + 60, "bulk")):
            policy = make()
            add(policy, "bulk", 1000, service=ServiceLevel.BULK)
            add(policy, "usual", 1000, age)
            assert names(run(policy, age)) == [first]

    def test_its_deadline_means_nothing(self) -> None:
        policy = make()
        add(policy, "bulk", 1000, service=ServiceLevel.BULK, deadline=1.5)
        add(policy, "usual", 1000)
        assert names(run(policy, 0.0)) == ["usual"]

    def test_a_backlog_of_it_delays_nobody_by_more_than_its_turns(self) -> None:
        """Ten seconds of it wait; one short prompt a second is answered within a few layers."""
        bulk = [Job(f"b{n}", 0.0, 100, outputs=3, service=ServiceLevel.BULK) for n in range(100)]
        quick = [Job(f"q{n}", 0.5 + n, 50, deadline=0.8 + n) for n in range(12)]
        cost = CostModel(PROFILE)
        cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
        policy = LengthAware(replace(CONFIG, layers=10), cost)
        trace = Executor(policy, CONFIG, cost, [*bulk, *quick], layers=10, separate=True).run()
        for job in quick:
            assert job.first_token is not None
            assert job.first_token <= job.arrival + 0.06 + 0.011 + 2 * trace.stretch
        assert max(job.first_token or 1e9 for job in bulk) < 15.0
