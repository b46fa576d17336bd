"""Requests that instances die of, those beside them, and machines that stand still."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.fleet.link.protocol import LossCause
from tests.fleet.router.fake_fleet import Bench, FakeLink, oracle

PROMPT = [5, 6, 7]
WAYS = ("engine", "process", "hang")
"""What a poison does: its engine ends; its whole instance does; or it hangs until it is killed."""


def step_others(bench: Bench, poison: Any) -> None:
    """Every job but those of ``poison`` makes a token."""
    for link in bench.links:
        for id, job in list(link.jobs.items()):
            if job.begun and id.partition("~")[0] != poison.id:
                link._make(id, job, 1)
        link.flush()


def victim(bench: Bench, poison: Any) -> FakeLink | None:
    """The instance that has ``poison``; it may be nowhere."""
    for link in bench.links:
        if any(id.partition("~")[0] == poison.id for id in link.jobs):
            return link
    return None


def kill(bench: Bench, link: FakeLink, way: str = "process") -> None:
    """The instance ends, and is back in another life."""
    if way == "engine":
        link.cut(restart=True, cause=LossCause.ENDED)
    elif way == "process":
        link.cut(restart=True)
    else:
        link.cut(cause=LossCause.SILENT)
        bench.clock.advance(3)
        link.boot += 1
    link.connect()


def stall(bench: Bench, seconds: float = 3.0) -> None:
    """The machine stands still: one instance after another falls silent, and all come back."""
    for link in bench.links:
        link.cut(cause=LossCause.SILENT)
        bench.clock.advance(0.3)
    bench.clock.advance(seconds)
    for link in bench.links:
        link.connect()
        bench.clock.advance(1.0)


def check_answer(client: Any) -> None:
    assert client.ends == ["length"]
    assert client.tokens == oracle(list(client.request.prompt), client.request.sampling)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_ended_two_instances_is_not_given_to_a_third(way: str) -> None:
    bench = Bench(4)
    streams = [bench.submit([*PROMPT, i], 20) for i in range(6)]
    poison = bench.submit(PROMPT)
    for _ in range(2):
        step_others(bench, poison)
        link = victim(bench, poison)
        assert link is not None
        kill(bench, link, way)
    assert poison.ends == ["error"]
    assert poison.errors == ["given up, because 2 instances ended with it"]
    bench.run()
    for stream in streams:
        check_answer(stream)
    bench.assert_nothing_left()


@given(
    st.sampled_from(WAYS), st.integers(2, 5), st.lists(st.booleans(), max_size=24), st.integers()
)
def test_a_poison_costs_few_instances_and_no_answer_beside_it(
    way: str, instances: int, before: list[bool], seed: int
) -> None:
    """None of them needs to have a token when the instances end."""
    bench = Bench(instances)
    innocents = [bench.submit([*PROMPT, i]) for i, early in enumerate(before) if early]
    poison = bench.submit([*PROMPT, seed % 1000])
    innocents += [bench.submit([*PROMPT, 99, i]) for i, early in enumerate(before) if not early]
    deaths = 0
    for turn in range(200):
        if poison.ends:
            break
        link = victim(bench, poison)
        if link is not None and (turn + seed) % 3:
            deaths += 1
            kill(bench, link, way)
        else:
            step_others(bench, poison)
        bench.clock.advance(0.3)
    bench.run()
    assert poison.ends == ["error"]
    assert deaths <= 3  # the third tells it from those that were with it twice
    for one in innocents:
        check_answer(one)
    bench.assert_nothing_left()


@given(st.integers(2, 6), st.lists(st.integers(1, 30), max_size=8), st.integers(1, 3))
def test_a_machine_that_stands_still_costs_no_request(
    instances: int, streams: list[int], stalls: int
) -> None:
    """Nothing has ended, so nothing is held against the requests that met every silence."""
    bench = Bench(instances)
    clients = [bench.submit([*PROMPT, i], tokens) for i, tokens in enumerate(streams)]
    for _ in range(stalls):
        clients.append(bench.submit([*PROMPT, len(clients)]))
        stall(bench)
    bench.run()
    for client in clients:
        check_answer(client)
    bench.assert_nothing_left()


def test_a_request_is_held_until_it_is_known_what_its_losses_were() -> None:
    bench = Bench(3)
    client = bench.submit(PROMPT)
    lost = []
    for _ in range(2):
        lost.append(bench.where(client))
        lost[-1].cut(cause=LossCause.SILENT)
    assert victim(bench, client) is None, "given to a third"
    assert (bench.fleet.parked, client.ended) == (1, False)
    lost[0].connect()
    assert victim(bench, client) is not None
    lost[1].connect()
    bench.run()
    check_answer(client)
    bench.assert_nothing_left()


def test_a_request_is_not_held_for_ever() -> None:
    bench = Bench(3, patience_seconds=10)
    client = bench.submit(PROMPT)
    for _ in range(2):
        bench.where(client).cut(cause=LossCause.SILENT)
    bench.clock.advance(9)
    assert not client.ended
    bench.clock.advance(2)
    assert client.ends == ["failed: no instance is ready"]
    bench.assert_nothing_left()


def test_one_end_and_one_silence_are_not_two_ends() -> None:
    bench = Bench(3)
    client = bench.submit(PROMPT)
    kill(bench, bench.where(client), "engine")
    silent = bench.where(client)
    silent.cut(cause=LossCause.SILENT)
    assert victim(bench, client) is None
    silent.connect()
    kill(bench, bench.where(client), "engine")
    assert client.errors == ["given up, because 2 instances ended with it"]
    bench.assert_nothing_left()


def test_a_request_that_makes_instances_hang_for_a_while_is_given_up_too() -> None:
    """They end nowhere, but each is lost alone."""
    bench = Bench(3, most_failures=4)
    client = bench.submit(PROMPT)
    hangs = 0
    while not client.ended:
        hangs += 1
        link = bench.where(client)
        link.cut(cause=LossCause.SILENT)
        bench.clock.advance(6)
        if not client.ended:
            link.connect()
    assert hangs == 4
    assert client.ends == ["failed: given up after 4 failures; the router's log has them"]


def test_a_cut_connection_is_no_end_of_an_instance() -> None:
    bench = Bench(3)
    client = bench.submit(PROMPT)
    for _ in range(3):
        link = bench.where(client)
        link.cut()
        link.connect()
        bench.clock.advance(1.1)
    bench.run()
    check_answer(client)


def test_the_log_names_the_instances_and_the_client_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(3)
    client = bench.submit(PROMPT)
    links = []
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            links.append(bench.where(client))
            kill(bench, links[-1], "engine")
    for link in links:
        assert f"{link.url} was lost: cut" in caplog.text
        assert link.url not in client.errors[0]
