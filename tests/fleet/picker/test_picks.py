"""Decisions for requests that pass by, and their accounts, on a fake clock."""

from __future__ import annotations

from typing import Any

import pytest

from pla_serve.fleet.picker.picks import NoPick, Picks
from pla_serve.fleet.picker.prompts import PickedPrompt
from pla_serve.policy.cost import CostProfile
from tests.fleet.router.fake_fleet import Bench

COST = CostProfile(per_token=1e-3)
"""A millisecond for each new token."""


def prompt(first: int, tokens: int = 320, **more: Any) -> PickedPrompt:
    fields = {"tenant": "", "cache_scope": "", "ttft_slo": None} | more
    return PickedPrompt([first + n for n in range(tokens)], **fields)


def picking(instances: int = 3, **options: Any) -> tuple[Bench, Picks]:
    bench = Bench(instances, **options)
    for link in bench.links:
        link.report(cost=COST, boundary_tokens=64)
    bench.clock.advance(2.0)
    for link in bench.links:
        link.report(cost=COST, boundary_tokens=64)
    return bench, Picks(bench.fleet, bench.clock.later)


def test_requests_at_the_same_time_go_to_different_instances() -> None:
    _, picks = picking(3)
    assert len({picks.pick(prompt(1000 * n)).instance.name for n in range(3)}) == 3


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    bench, picks = picking(3)
    others = [picks.pick(prompt(1000 * n)) for n in range(3)]
    for each in others:
        picks.answered(each, 200)
        picks.end(each)
    bench.clock.advance(10.0)
    for each in others:
        again = picks.pick(PickedPrompt([*each.request.original.prompt, 7], "", "", None))
        assert again.instance is each.instance
        picks.end(again)


def test_a_prefix_of_another_scope_is_not_taken_for_cached() -> None:
    bench, picks = picking(2)
    first = picks.pick(prompt(0, 3200, cache_scope="a"))
    picks.answered(first, 200)
    picks.end(first)
    chain = picks.pick(prompt(0, 3200, cache_scope="b")).request.chain
    assert not bench.fleet.dispatcher.prefixes.match(chain).get(first.instance.name)


def test_a_prefill_is_on_the_account_for_as_long_as_it_was_predicted_to_take() -> None:
    bench, picks = picking(1)
    picked = picks.pick(prompt(0, 320))
    name = picked.instance.name
    assert bench.fleet.dispatcher.outstanding(name)[1] == pytest.approx(0.34, abs=0.03)
    bench.clock.advance(0.1)
    assert bench.fleet.dispatcher.outstanding(name)[1] > 0
    bench.clock.advance(0.4)
    assert bench.fleet.dispatcher.outstanding(name) == (1, 0.0)
    picks.end(picked)
    assert bench.fleet.dispatcher.outstanding(name) == (0, 0.0)
    assert bench.clock.pending == 0


def test_a_client_that_leaves_before_the_answer_leaves_nothing_behind() -> None:
    bench, picks = picking(2)
    picked = picks.pick(prompt(0))
    picks.end(picked)
    assert picks.in_flight == 0
    assert bench.fleet.dispatcher.charges == 0
    assert bench.fleet.dispatcher.prefixes.match(picked.request.chain) == {}
    assert not picked.instance.attempts
    assert bench.clock.pending == 0


def test_an_instance_that_fails_again_and_again_gets_nothing_for_a_while() -> None:
    _, picks = picking(2)
    first = picks.pick(prompt(0))
    for _ in range(3):
        picks.answered(first, 502)
        picks.end(first)
        first = picks.pick(prompt(0), allowed=[first.instance.name])
    picks.end(first)
    assert not first.instance.circuit.closed
    names = {picks.pick(prompt(1000 * n)).instance.name for n in range(1, 5)}
    assert first.instance.name not in names


def test_an_instance_that_is_lost_takes_its_accounts_with_it() -> None:
    bench, picks = picking(2)
    picked = [picks.pick(prompt(1000 * n)) for n in range(4)]
    gone = bench.links[0]
    gone.cut(restart=True)
    assert picks.pick(prompt(9000)).instance.name != gone.url
    gone.connect()
    for each in picked:
        picks.answered(each, 200)
        picks.end(each)
    assert bench.fleet.dispatcher.outstanding(gone.url) == (0, 0.0)


def test_without_an_instance_there_is_no_pick() -> None:
    bench, picks = picking(2)
    for link in bench.links:
        link.cut()
    with pytest.raises(NoPick, match="no instance is ready") as refused:
        picks.pick(prompt(0))
    assert refused.value.status == 503
    assert bench.seen.refusals == ["capacity"]
    assert picks.in_flight == 0


def test_a_draining_instance_gets_nothing_new() -> None:
    bench, picks = picking(2)
    bench.links[0].report(draining=True, cost=COST)
    names = {picks.pick(prompt(1000 * n)).instance.name for n in range(4)}
    assert names == {bench.links[1].url}


def test_only_the_instances_that_envoy_allows_are_picked() -> None:
    bench, picks = picking(3)
    assert picks.pick(prompt(0), allowed=["i2"]).instance.name == "i2"
    with pytest.raises(NoPick):
        picks.pick(prompt(0), allowed=[])
    assert bench.fleet.dispatcher.charges == 1


def test_a_key_that_floods_a_full_fleet_is_refused() -> None:
    bench, picks = picking(1, max_predicted_wait=0.5)

    def flood() -> None:
        for n in range(20):
            picks.pick(prompt(1000 * n, tenant="key-0"))

    with pytest.raises(NoPick) as refused:
        flood()
    assert refused.value.status == 429
    assert refused.value.retry_after >= 1
    assert picks.pick(prompt(90_000, 64, tenant="key-1")).instance.name == "i0"
    assert bench.seen.refusals == ["share"]


def test_a_request_without_a_prompt_is_charged_to_nobody() -> None:
    bench, picks = picking(2)
    picked = picks.pick(None)
    assert bench.fleet.dispatcher.charges == 0
    picks.answered(picked, 500)
    assert picked.instance.circuit.closed
    picks.end(picked)
    assert picks.in_flight == 0
