"""Failover, refusals, affinity, fairness and hand-overs, on fake instances."""

from __future__ import annotations

import msgspec
import pytest

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.policy.cost import CostProfile
from pla_serve.wire.engine import AbortRequest, AddRequest, Lend, Output, Reserve
from tests.fleet.router.fake_fleet import Bench, FakeLink, oracle

PROMPT = list(range(40))


def test_a_request_gets_the_tokens_of_one_instance() -> None:
    bench = Bench()
    client = bench.submit(PROMPT)
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert client.ends == ["length"]
    assert client.accepted == 1
    bench.assert_nothing_left()


def test_lost_before_the_first_token_it_goes_elsewhere_at_once() -> None:
    bench = Bench()
    client = bench.submit(PROMPT)
    first = bench.where(client)
    first.cut()
    assert bench.where(client) is not first
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert bench.seen.moves == [(first.url, "lost", False)]
    bench.assert_nothing_left()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lost_after_tokens_it_is_continued_exactly(temperature: float) -> None:
    bench = Bench()
    client = bench.submit(PROMPT, 6, temperature=temperature)
    first = bench.where(client)
    first.step(2)
    first.flush()
    assert len(client.tokens) == 2
    first.cut()
    second = bench.where(client)
    message = second.received[-1]
    assert isinstance(message, AddRequest)
    assert message.prompt == PROMPT + client.tokens
    assert message.generated == 2
    assert message.sampling.max_tokens == 6
    assert (message.sampling.seed is None) == (temperature == 0)
    bench.run()
    assert client.tokens == oracle(PROMPT, message.sampling)
    assert client.accepted == 1
    bench.assert_nothing_left()


def test_what_was_on_its_way_when_an_instance_was_lost_is_made_again() -> None:
    bench = Bench(2)
    client = bench.submit(PROMPT, 6)
    first = bench.where(client)
    first.step(3)  # never delivered
    first.cut()
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)


def test_an_instance_that_failed_it_is_left_out_although_it_is_back() -> None:
    bench = Bench(2)
    client = bench.submit(PROMPT)
    first = bench.where(client)
    first.cut()
    first.connect()
    second = bench.where(client)
    second.cut()
    bench.clock.advance(0.1)
    assert bench.where(client) is first, "the only one left, on a new connection"


def test_it_waits_for_an_instance_and_then_fails_without_its_name() -> None:
    bench = Bench(1, patience_seconds=10)
    client = bench.submit(PROMPT)
    bench.links[0].cut()
    assert not client.ended
    bench.clock.advance(9)
    assert not client.ended
    bench.clock.advance(2)
    assert client.ends == ["failed: no instance is ready"]
    bench.assert_nothing_left()


def test_it_goes_on_when_an_instance_is_back_in_time() -> None:
    bench = Bench(1, patience_seconds=10)
    client = bench.submit(PROMPT)
    bench.links[0].cut(restart=True)
    bench.clock.advance(5)
    bench.links[0].connect()
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    bench.assert_nothing_left()


def test_a_request_that_breaks_every_instance_is_given_up() -> None:
    bench = Bench(6, most_failures=3, most_lost_engines=9)
    client = bench.submit(PROMPT)
    for _ in range(3):
        bench.where(client).cut()
    assert client.ends == ["failed: given up after 3 failures; the router's log has them"]
    assert sum(link.connected for link in bench.links) == 3
    bench.assert_nothing_left()


def test_an_error_of_an_instance_is_tried_elsewhere() -> None:
    bench = Bench()
    client = bench.submit(PROMPT)
    first = bench.where(client)
    first.error(client.id)
    first.flush()
    assert bench.where(client) is not first
    bench.run()
    assert client.ends == ["length"]


def test_a_full_instance_is_passed_over_and_a_full_fleet_refuses() -> None:
    bench = Bench(2)
    bench.links[0].refuse = True
    clients = [bench.submit([n] * 20) for n in range(4)]
    bench.run()
    assert all(client.ends == ["length"] for client in clients)
    bench.links[1].refuse = True
    client = bench.submit(PROMPT)
    bench.run()
    assert client.ends == ["rejected"]
    assert client.rejected.retry_after == 1
    assert bench.seen.refusals == ["capacity"]
    bench.assert_nothing_left()


def test_a_stream_that_has_begun_waits_for_room() -> None:
    bench = Bench(2)
    client = bench.submit(PROMPT, 6)
    first = bench.where(client)
    first.step()
    first.flush()
    other = next(link for link in bench.links if link is not first)
    other.refuse = True
    first.cut()
    bench.run(3)
    assert not client.ended
    other.refuse = False
    bench.clock.advance(1.5)
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    bench.assert_nothing_left()


def test_what_its_client_closes_is_aborted_and_forgotten() -> None:
    bench = Bench()
    client = bench.submit(PROMPT)
    where = bench.where(client)
    bench.fleet.close(client.id)
    assert where.received[-1] == AbortRequest(client.id)
    where.step()
    where.flush()
    assert client.tokens == []
    bench.assert_nothing_left()
    assert len(bench.fleet.dispatcher.prefixes) == 0


def test_turns_of_a_conversation_stay_together() -> None:
    bench = Bench(4)
    prompts = [[n] * 64 for n in range(8)]
    homes = []
    for prompt in prompts:
        client = bench.submit(prompt, 16)
        homes.append(bench.where(client))
        bench.clock.advance(0.1)
        bench.run()
        prompt += [*client.tokens, *range(10)]
    assert len(set(map(id, homes))) > 1
    for prompt, home in zip(prompts, homes, strict=True):
        client = bench.submit(prompt)
        assert bench.where(client) is home
        bench.run()


def test_a_new_life_of_an_instance_has_nothing_cached() -> None:
    bench = Bench(2)
    client = bench.submit([1] * 64)
    home = bench.where(client)
    bench.run()
    home.cut(restart=True)
    home.connect()
    assert bench.fleet.dispatcher.prefixes.match(Chain([1] * 64)) == {}


def test_a_draining_instance_gets_nothing_new_and_loses_nothing() -> None:
    bench = Bench(2)
    client = bench.submit(PROMPT, 6)
    first = bench.where(client)
    first.report(draining=True)
    others = [bench.submit([n] * 20) for n in range(5)]
    assert all(bench.where(other) is not first for other in others)
    bench.run()
    assert client.ends == ["length"]
    first.report()
    assert {bench.where(bench.submit([n] * 30)).url for n in range(6)} == {"i0", "i1"}


def test_classes_go_to_their_pools() -> None:
    bench = Bench(roles=["short", "long"])
    for link in bench.links:
        link.report(boundary_tokens=64)
    bench.clock.advance(2)
    for link in bench.links:
        link.report(boundary_tokens=64)
    busy = [bench.submit([n] * 1000) for n in range(2)]
    assert bench.where(busy[0]) is bench.links[1]
    assert bench.where(bench.submit([7] * 30)) is bench.links[0]


def open_circuit(bench: Bench) -> FakeLink:
    """Of the first of two instances, by three errors in a row."""
    bad = bench.links[0]
    for n in range(3):
        client = bench.submit([n] * 20)
        while bench.where(client) is not bad:
            bench.run()
            client = bench.submit([n] * 20)
        bad.error(client.id)
        bad.flush()
        bench.run()
    return bad


def test_a_probe_that_could_not_be_sent_does_not_bar_the_next_one() -> None:
    bench = Bench(2)
    bad = open_circuit(bench)
    bench.clock.advance(2.1)
    bad.connected = False  # and nobody has been told yet
    for n in range(3):
        bench.submit([50 + n] * 20)
    bad.cut()
    bad.connect()
    bench.clock.advance(120)
    sent = bench.seen.sent.count("i0")
    for n in range(3):
        bench.submit([70 + n] * 20)
    assert bench.seen.sent.count("i0") == sent + 1
    bench.run()


def test_an_open_circuit_is_closed_by_one_probe() -> None:
    bench = Bench(2)
    open_circuit(bench)
    sent = bench.seen.sent.count("i0")
    for n in range(10):
        bench.submit([50 + n] * 20)
    bench.run()
    assert bench.seen.sent.count("i0") == sent
    bench.clock.advance(2.1)
    for n in range(5):
        bench.submit([70 + n] * 20)
    assert bench.seen.sent.count("i0") == sent + 1
    bench.run()
    for n in range(5):
        bench.submit([90 + n] * 20)
    assert bench.seen.sent.count("i0") > sent + 1


def test_who_floods_is_refused_and_who_does_not_is_served() -> None:
    bench = Bench(2, max_predicted_wait=1.0)
    flood = [bench.submit([n, *range(400)], tenant="flood") for n in range(40)]
    refused = [client for client in flood if client.rejected]
    assert 10 < len(refused) < 40
    assert all(client.rejected.retry_after >= 1 for client in refused)
    polite = bench.submit([7, *range(300)], tenant="polite")
    assert polite.rejected is None
    assert bench.submit([8, *range(400)], tenant="flood").rejected
    assert bench.seen.refusals[0] == "share"
    bench.run()
    assert polite.ends == ["length"]
    assert bench.submit([9, *range(400)], tenant="flood").rejected is None


def test_an_instance_of_another_model_gets_nothing() -> None:
    bench = Bench(2)
    other = bench.links[1]
    other.cut()
    facts = other.facts
    assert facts is not None
    other.connected = True
    bench.fleet.connected(other, msgspec.structs.replace(facts, vocab_size=7))  # type: ignore[arg-type]
    for n in range(4):
        bench.submit([n] * 20)
    assert bench.seen.sent == ["i0"] * 4


def test_two_routers_over_the_same_instances_stay_sane() -> None:
    """Each sees the other's work in the reports, and news of one never reaches the other."""
    left, right = Bench(2), Bench(2)
    one = left.submit([1, *range(600)])
    home = left.links.index(left.where(one))
    work = left.fleet.dispatcher.outstanding(f"i{home}")[1]
    right.links[home].report(
        queued_long_seconds=work,
        cost=CostProfile(),
    )
    right.links[1 - home].report(
        cost=CostProfile(),
    )
    two = right.submit([2, *range(600)])
    assert right.links.index(right.where(two)) == 1 - home
    left.run()
    right.run()
    assert one.ends == two.ends == ["length"]


# Hand-overs


def apart() -> Bench:
    return Bench(roles=["short", "long", "decode", "decode"])


def test_prefill_here_and_decode_there() -> None:
    bench = apart()
    client = bench.submit(PROMPT, 6)
    source = bench.where(client)
    assert source.role in ("short", "long")
    source.flush()  # accepted, offer
    target = next(link for link in bench.links if link.jobs and link is not source)
    assert target.role == "decode"
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert client.accepted == 1
    assert bench.seen.hand_overs == ["begun"]
    bench.assert_nothing_left()


def test_a_single_token_needs_no_hand_over() -> None:
    bench = apart()
    client = bench.submit(PROMPT, 1)
    bench.run()
    assert client.ends == ["length"]
    assert bench.seen.hand_overs == []


@pytest.mark.parametrize("moment", ["before the offer", "reserving", "reserved", "handed over"])
@pytest.mark.parametrize("victim", ["source", "target", "both"])
def test_a_cut_at_any_moment_of_a_hand_over(moment: str, victim: str) -> None:
    bench = apart()
    client = bench.submit(PROMPT, 6)
    source = bench.where(client)
    target = None
    if moment != "before the offer":
        source.flush()
        target = next(link for link in bench.links if link.jobs and link is not source)
    if moment in ("reserved", "handed over"):
        assert target is not None
        target.flush()
    if moment == "handed over":
        source.step()
        source.flush()
    if victim in ("source", "both"):
        source.cut()
    if victim in ("target", "both") and target is not None:
        target.cut()
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert client.ends == ["length"]
    bench.assert_nothing_left()


def test_no_memory_at_any_decode_instance() -> None:
    bench = apart()
    for link in bench.links[2:]:
        link.refuse = True
    client = bench.submit(PROMPT, 6)
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert bench.seen.hand_overs[-1] == "no target"
    bench.assert_nothing_left()


def test_a_reservation_that_expired_is_computed_again() -> None:
    bench = apart()
    client = bench.submit(PROMPT, 6)
    source = bench.where(client)
    source.flush()
    target = next(link for link in bench.links if link.jobs and link is not source)
    target.flush()
    source.step()
    target.expire(next(iter(target.jobs)))  # on its way while Begin is sent
    source.flush()
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    bench.assert_nothing_left()


def test_a_scored_prompt_stays_on_one_instance() -> None:
    """Wherever its KV may be cached, and whatever decode instances there are."""
    bench = apart()
    client = bench.submit(PROMPT, 6, prompt_logprobs=1)
    bench.run()
    assert client.tokens == oracle(PROMPT, client.request.sampling)
    assert bench.seen.hand_overs == []
    bench.assert_nothing_left()


# Fetches of cached KV


@pytest.mark.parametrize("scope", ["", "of a tenant"])
def test_a_prompt_is_fetched_to_where_there_is_room_if_that_is_faster(scope: str) -> None:
    bench = Bench(2, transfer=True)
    cost = CostProfile(1e-3, 0, 0, 0, 0)
    prefix = list(range(800))
    first = bench.submit(prefix, cache_scope=scope)
    home = bench.where(first)
    other = next(link for link in bench.links if link is not home)
    bench.run()
    bench.clock.advance(2)
    home.report(cost=cost, queued_long_seconds=30.0)
    other.report(cost=cost)
    stranger = bench.submit([*prefix, 4, 5, 6], 4, cache_scope="of another tenant")
    assert bench.where(stranger) is other, "nothing is cached for it, and nothing is fetched"
    bench.run()
    bench.clock.advance(2)
    client = bench.submit([*prefix, 1, 2, 3], 4, cache_scope=scope)
    assert isinstance(home.received[-1], Lend)
    assert home.received[-1].cache_scope == scope
    home.flush()
    assert isinstance(other.received[-1], Reserve)
    bench.run()
    assert client.tokens == oracle([*prefix, 1, 2, 3], client.request.sampling)
    assert bench.seen.hand_overs == ["begun"]
    bench.assert_nothing_left()


def test_nothing_is_fetched_for_a_prompt_that_is_scored() -> None:
    bench = Bench(2, transfer=True)
    cost = CostProfile(1e-3, 0, 0, 0, 0)
    prefix = list(range(800))
    home = bench.where(bench.submit(prefix))
    bench.run()
    bench.clock.advance(2)
    home.report(cost=cost, queued_long_seconds=30.0)
    other = next(link for link in bench.links if link is not home)
    other.report(cost=cost)
    scored = bench.submit([*prefix, 1, 2, 3], 4, prompt_logprobs=1)
    assert bench.where(scored) is other
    assert not any(isinstance(message, Lend) for message in home.received)
    bench.run()
    bench.assert_nothing_left()


@pytest.mark.parametrize("moment", ["lending", "reserving", "begun"])
@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_cut_at_any_moment_of_a_fetch(moment: str, victim: str) -> None:
    bench = Bench(2, transfer=True)
    cost = CostProfile(1e-3, 0, 0, 0, 0)
    prefix = list(range(800))
    home = bench.where(bench.submit(prefix))
    other = next(link for link in bench.links if link is not home)
    bench.run()
    bench.clock.advance(2)
    home.report(cost=cost, queued_long_seconds=30.0)
    other.report(cost=cost)
    client = bench.submit([*prefix, 1, 2, 3], 4)
    if moment != "lending":
        home.flush()
    if moment == "begun":
        other.flush()
    (home if victim == "source" else other).cut()
    bench.run()
    assert client.tokens == oracle([*prefix, 1, 2, 3], client.request.sampling)
    bench.assert_nothing_left()


def at_fault(id: str, error: str = "the grammar takes too long") -> Output:
    return Output(id=id, tokens=[], finish_reason="error", error=error, fault="request")


def test_a_fault_of_the_request_ends_it_and_says_nothing_of_the_instance() -> None:
    bench = Bench(2)
    other = bench.submit(PROMPT, 6)
    for _ in range(9):
        client = bench.submit(PROMPT)
        link = bench.where(client)
        [id] = [id for id, job in link.jobs.items() if job.left == 4]
        del link.jobs[id]
        link.outbox.append(at_fault(id))
        link.flush()
        assert client.ends == ["error"]
        assert client.errors == ["the grammar takes too long"]
    assert all(instance.circuit.closed for instance in bench.fleet.instances)
    assert bench.seen.moves == []
    bench.run()
    assert other.tokens == oracle(PROMPT, other.request.sampling)
    bench.assert_nothing_left()
