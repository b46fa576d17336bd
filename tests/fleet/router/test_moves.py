"""Instances that say when they end: what runs there goes on elsewhere, token for token."""

from __future__ import annotations

from typing import Any

import pytest

from pla_serve.fleet.router.departures import LAST_SECONDS, LOOK_SECONDS
from pla_serve.wire.engine import AbortRequest, AddRequest, Begin, Lend, Reserve
from tests.fleet.router.fake_fleet import Bench, FakeLink, oracle

PROMPT = list(range(40))


def a_bench(instances: int = 2, *, transfer: bool = True, **options: Any) -> Bench:
    return Bench(instances, transfer=transfer, **options)


def running(bench: Bench, tokens: int = 30, prompt: list[int] = PROMPT) -> tuple[Any, FakeLink]:
    """A request that has two tokens, and the instance that has it."""
    client = bench.submit(prompt, tokens)
    link = bench.where(client)
    link.step(2)
    link.flush()
    assert len(client.tokens) == 2
    return client, link


def notice(link: FakeLink, seconds: float) -> None:
    link.report(ready=False, ends_in=seconds)


def other(bench: Bench, link: FakeLink) -> FakeLink:
    (found,) = [each for each in bench.links if each is not link]
    return found


def look(bench: Bench, seconds: float = LOOK_SECONDS) -> None:
    bench.clock.advance(seconds)


def finish(bench: Bench, *clients: Any) -> None:
    """Let everything end, and check that it ended well and left nothing."""
    bench.run(60)
    for link in bench.links:
        if link.connected:
            link.report()
    bench.clock.advance(2)
    bench.run(60)
    for client in clients:
        assert client.tokens == oracle(client.request.prompt, client.request.sampling)
        assert client.ends == ["length"]
    bench.assert_nothing_left()


def test_a_stream_moves_with_its_kv_and_prefills_nothing() -> None:
    bench = a_bench()
    client, source = running(bench)
    target = other(bench, source)
    notice(source, 1.0)
    look(bench)
    source.step()  # it goes on meanwhile
    source.flush()
    source.step()
    source.flush()
    target.flush()
    kinds = [type(message) for message in target.received]
    assert kinds == [Reserve, Begin]
    (lend,) = [message for message in source.received if isinstance(message, Lend)]
    assert lend.tokens == PROMPT + client.tokens[:2]
    reserve, begin = target.received
    assert reserve.request.prompt + begin.tokens == PROMPT + client.tokens
    assert not source.jobs
    assert source.offers  # until the target has made a token
    target.step()
    target.flush()
    assert not source.offers
    assert bench.seen.moves == [(source.url, "drained", True)]
    assert bench.seen.hand_overs == ["moved"]
    finish(bench, client)


def test_requests_stay_as_long_as_a_move_still_fits() -> None:
    bench = a_bench()
    client, source = running(bench)
    notice(source, 30.0)
    look(bench, 20)
    assert not any(isinstance(message, Lend) for message in source.received)
    look(bench, 8.2)
    assert any(isinstance(message, Lend) for message in source.received)
    finish(bench, client)


def test_one_that_ends_in_time_never_moves() -> None:
    bench = a_bench()
    client, source = running(bench)
    notice(source, 30.0)
    look(bench, 5)
    source.step(28)
    source.flush()
    look(bench, 30)
    assert client.ends == ["length"]
    assert not other(bench, source).received
    finish(bench, client)


def test_nothing_new_goes_to_an_instance_that_ends() -> None:
    bench = a_bench()
    notice(bench.links[0], 30.0)
    for number in range(4):
        assert bench.where(bench.submit([number] * 9, 1)) is bench.links[1]
    finish(bench)


def test_what_has_not_begun_and_would_not_in_time_is_placed_anew_at_once() -> None:
    bench = a_bench()
    client = bench.submit(PROMPT, 5)
    source = bench.where(client)
    notice(source, 1.0)
    look(bench)
    assert bench.where(client) is other(bench, source)
    finish(bench, client)


def test_a_withdrawn_notice_moves_nobody() -> None:
    bench = a_bench()
    client, source = running(bench)
    notice(source, 10.0)
    look(bench, 2)
    source.report()
    look(bench, 30)
    assert bench.where(client) is source
    finish(bench, client)


def test_without_kv_transfer_the_last_moment_is_a_prefill_elsewhere() -> None:
    bench = a_bench(transfer=False)
    client, source = running(bench)
    target = other(bench, source)
    notice(source, 3.0)
    look(bench, 2.0)
    assert bench.where(client) is source
    look(bench, 1.0 - LAST_SECONDS + LOOK_SECONDS)
    assert bench.where(client) is target
    (message,) = [each for each in target.received if isinstance(each, AddRequest)]
    assert message.generated == 2
    finish(bench, client)


def test_alone_it_goes_on_to_the_end() -> None:
    bench = a_bench(1)
    client, source = running(bench)
    notice(source, 1.0)
    look(bench, 1.0)
    source.step(28)
    source.flush()
    finish(bench, client)


@pytest.mark.parametrize(
    "fault",
    [
        "refused",
        "no kv",
        "target lost",
        "source lost",
        "closed",
        "ended",
        "lease over",
        "late",
        "source error",
    ],
)
@pytest.mark.parametrize("phase", ["lent", "reserved", "begun"])
def test_a_move_that_fails_costs_a_pause_and_no_token(fault: str, phase: str) -> None:
    bench = a_bench(3)
    client, source = running(bench)
    notice(source, 1.5)
    target = None
    if phase == "lent" and fault == "refused":
        for link in bench.links:
            link.refuse = link is not source
    look(bench)
    if phase != "lent":
        source.flush()
        (target,) = [link for link in bench.links if Reserve in map(type, link.received)]
    if phase == "begun":
        assert target is not None
        target.flush()
        assert Begin in map(type, target.received)
    strike(bench, fault, client, source, target)
    for link in bench.links:
        link.refuse = False
    for _ in range(30):
        look(bench)
        for link in bench.links:
            if link.connected:
                link.flush()
                link.step()
                link.flush()
    if source.connected:
        source.cut(restart=True)
    for link in bench.links:
        if not link.connected:
            link.connect(link.boot)
    if fault == "closed":
        bench.run(20)
        for link in bench.links:
            link.report()
        bench.clock.advance(2)
        bench.assert_nothing_left()
    else:
        finish(bench, client)


def strike(
    bench: Bench, fault: str, client: Any, source: FakeLink, target: FakeLink | None
) -> None:
    """Have something go wrong in the middle of a move."""
    if fault == "no kv":
        source.outbox = [
            type(m)(id=m.id, source=b"", tokens=0) if hasattr(m, "source") else m
            for m in source.outbox
        ]
    elif fault == "target lost" and target is not None:
        target.cut(restart=True)
    elif fault == "source lost":
        source.cut(restart=True)
    elif fault == "closed":
        bench.fleet.close(client.id)
    elif fault == "ended":
        for link in bench.links:
            link.step(60)
            link.flush()
    elif fault == "lease over" and target is not None:
        for id in list(target.jobs):
            target.expire(id)
    elif fault == "late" and target is not None:
        target.jobs = {id: job for id, job in target.jobs.items() if job.begun}
    elif fault == "source error":
        for id in list(source.jobs):
            source.error(id)


def test_decodes_of_a_decode_instance_stay_in_its_pool() -> None:
    bench = Bench(roles=["short", "long", "decode", "decode"])
    client = bench.submit(PROMPT, 30)
    for _ in range(6):
        for link in bench.links:
            link.flush()
            link.step()
    (source,) = [link for link in bench.links if any(job.begun for job in link.jobs.values())]
    assert source.role == "decode"
    notice(source, 1.0)
    look(bench)
    source.flush()
    (target,) = [link for link in bench.links if Reserve in map(type, link.received[-1:])]
    assert target.role == "decode"
    finish(bench, client)


def test_a_crowd_leaves_in_time_and_no_look_takes_long() -> None:
    bench = a_bench(12, patience_seconds=1e9)
    clients = [bench.submit([n, *PROMPT], 400) for n in range(300)]
    for link in bench.links:
        link.step(2)
        link.flush()
    source = bench.links[0]
    here = len(source.jobs)
    assert here >= 20
    notice(source, 20.0)
    for _ in range(190):
        look(bench)
        for link in bench.links:
            link.flush()
        if not source.jobs:
            break
    assert not source.jobs
    for client in clients:
        bench.fleet.close(client.id)


def test_few_move_at_one_time_and_all_get_away() -> None:
    bench = a_bench(3)
    clients = [bench.submit([n, n, *PROMPT], 40) for n in range(18)]
    source = bench.links[0]
    for link in bench.links:
        link.step(2)
        link.flush()
    here = [client for client in clients if bench.where(client) is source]
    assert len(here) > 4
    notice(source, 1.9)
    for _ in range(12):
        look(bench)
        lent = sum(isinstance(message, Lend) for message in source.received)
        begun = sum(isinstance(m, Begin) for link in bench.links for m in link.received)
        assert lent - begun <= 4
        for link in bench.links:
            link.flush()
    aborted = sum(isinstance(message, AbortRequest) for message in source.received)
    assert aborted == len(here)
    assert not source.jobs
    source.cut(restart=True)
    source.connect()
    finish(bench, *clients)
