"""Checks of grammars: attackers pay for what they send, others are answered soon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from itertools import islice
from random import Random
from typing import Any

import pytest
from benchmarks.abuse_parts.grammars import hostile_grammars

from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.tokenizer import GrammarVocabulary, vocabulary_of
from pla_serve.grammar.turns import Turns
from pla_serve.server.generation import grammar_checks as module
from pla_serve.server.generation.grammar_checks import GrammarChecks, TooManyChecks
from pla_serve.wire.engine import Grammar
from tests.server.server_harness import make_tokenizer

DEADLINE = 120.0
SLOW = [
    Grammar("json_schema", f'{{"type": "integer", "multipleOf": {10**7 + i}}}') for i in range(9)
]
Body = Callable[[GrammarChecks], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return vocabulary_of(make_tokenizer(), 257)


@pytest.fixture
def run(vocabulary: GrammarVocabulary) -> Callable[..., None]:
    """Run a test with checks of its own, on an event loop of its own."""

    def in_loop(body: Body, limits: GrammarLimits | None = None) -> None:
        async def main() -> None:
            checks = GrammarChecks(vocabulary, limits)
            try:
                async with asyncio.timeout(DEADLINE):
                    await body(checks)
            finally:
                checks.close()

        asyncio.run(main())

    return in_loop


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def refusal(check: Awaitable[None]) -> str:
    with pytest.raises(GrammarError) as caught:
        await check
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "spec", "cause"),
    [
        ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)), "3001 rules"),
        ("json_schema", '{"type":"integer","multipleOf":10000019}', "simplify"),
        ("regex", "((a{1000}){1000}){1000}", "simplify"),
        ("json_schema", json.dumps({"allOf": [{"multipleOf": 97 + i} for i in range(9)]}), ""),
        ("json_schema", '{"$ref": "#"}', "no token can begin"),
        ("lark", "start: start", "no token can begin"),
        ("lark", 'start: a "x"\na: b\nb: a', "no token can begin"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "nested 5001 deep"),
        ("json_schema", '{"a":"' + '[\\"' * 90 + '"}', ""),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "nested 5000 deep"),
        ("lark", "start: " + "[" * 5000 + '"a"' + "]" * 5000, "nested 5000 deep"),
        ("regex", "a" * 300_000, "300000 characters"),
    ],
)
def test_a_hostile_grammar_is_refused_with_its_cause(
    run: Callable[..., None], kind: Any, spec: str, cause: str
) -> None:
    async def body(checks: GrammarChecks) -> None:
        if cause:
            assert cause in await refusal(checks(Grammar(kind, spec), "k"))
        else:
            await asyncio.wait([asyncio.ensure_future(checks(Grammar(kind, spec), "k"))])
        await checks(Grammar("regex", "a+"), "k")

    run(body)


def test_a_crash_of_the_library_is_a_refusal_of_that_grammar(run: Callable[..., None]) -> None:
    deep = Grammar("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(6000)))

    async def body(checks: GrammarChecks) -> None:
        assert "overflowed its stack" in await refusal(checks(deep, "k"))
        await checks(Grammar("regex", "a+"), "k")

    run(body, GrammarLimits(definitions=10**6))


def test_a_grammar_does_not_pay_for_what_others_left_in_its_worker(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker keeps what it compiled. Some quick grammars of another key, of 8 MiB each, and the
    next schema was refused for want of memory, for good."""
    monkeypatch.setattr(module, "QUICK_SECONDS", 10.0)  # however busy this machine is

    async def body(checks: GrammarChecks) -> None:
        for number in range(12):
            await checks(Grammar("regex", f"{number}(a{{150}}){{150}}"), "attacker")
            texts = [f"{number}-{entry}-{'abcdefgh' * 4}" for entry in range(1500)]
            schema = json.dumps({"enum": texts})
            await checks(Grammar("json_schema", schema), "other")

    run(body, GrammarLimits(memory_bytes=32 * 2**20))


@pytest.mark.parametrize("attacker", ["another key", "the same key"])
def test_others_are_answered_while_attackers_compile(
    run: Callable[..., None], attacker: str
) -> None:
    async def body(checks: GrammarChecks) -> None:
        await checks(Grammar("regex", "warm"), "k")
        whose = "a" if attacker == "another key" else "k"
        attacks = [asyncio.ensure_future(checks(one, whose)) for one in SLOW]
        await until(lambda: checks.busy_pids)
        await checks(Grammar("json_object"), "k")
        await checks(Grammar("regex", "b+"), "k")
        assert not all(attack.done() for attack in attacks)
        for attack in attacks:
            attack.cancel()
        await asyncio.wait(attacks)

    # So slow that none of the attacks ends by itself before the test does.
    run(body, GrammarLimits(compile_seconds=600.0, memory_bytes=400 * 2**20))


def test_who_hangs_up_frees_the_place_and_ends_the_work(run: Callable[..., None]) -> None:
    async def body(checks: GrammarChecks) -> None:
        attacks = [asyncio.ensure_future(checks(one, "a")) for one in SLOW]
        await until(lambda: checks.busy_pids)
        pids = checks.busy_pids
        for attack in attacks:
            attack.cancel()
        await asyncio.wait(attacks)
        await until(lambda: not any(map(alive, pids)))
        assert checks.busy_pids == []
        await checks(Grammar("regex", "a+"), "a")

    run(body, GrammarLimits(compile_seconds=600.0, memory_bytes=400 * 2**20))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_tenant_may_have_so_many_checks_waiting(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)

    async def body(checks: GrammarChecks) -> None:
        attacks = [asyncio.ensure_future(checks(one, "a")) for one in SLOW]
        done, _ = await asyncio.wait(attacks, return_when=asyncio.FIRST_COMPLETED)
        assert all(isinstance(one.exception(), TooManyChecks) for one in done)
        await checks(Grammar("regex", "a+"), "b")
        for attack in attacks:
            attack.cancel()
        await asyncio.wait(attacks)

    run(body, GrammarLimits(compile_seconds=600.0, memory_bytes=400 * 2**20))


def test_a_known_grammar_needs_no_worker(run: Callable[..., None]) -> None:
    good, bad = Grammar("regex", "a+"), Grammar("regex", "(")

    async def body(checks: GrammarChecks) -> None:
        await checks(good, "k")
        why = await refusal(checks(bad, "k"))
        os.kill(checks.nursery_pid, signal.SIGSTOP)
        try:
            await checks(good, "k")
            assert await refusal(checks(bad, "k")) == why
            await checks(Grammar("json_object"), "k")
        finally:
            os.kill(checks.nursery_pid, signal.SIGCONT)

    run(body)


def test_a_lost_nursery_is_replaced(run: Callable[..., None]) -> None:
    async def body(checks: GrammarChecks) -> None:
        await checks(Grammar("regex", "a"), "k")
        for spec in ("b", "c"):
            os.kill(checks.nursery_pid, signal.SIGKILL)
            await checks(Grammar("regex", spec), "k")
            await checks(Grammar("regex", spec * 2), "k")

    run(body)


@pytest.mark.parametrize("seed", [1, 2])
def test_grammars_from_a_seed_hurt_nobody(run: Callable[..., None], seed: int) -> None:
    """Whatever they are: each is answered, and the loop is never held up."""
    hostile = list(islice(hostile_grammars(Random(seed)), 24))
    assert hostile == list(islice(hostile_grammars(Random(seed)), 24))

    async def body(checks: GrammarChecks) -> None:
        longest, before = 0.0, time.thread_time()

        async def watch() -> None:
            nonlocal longest, before
            while True:
                await asyncio.sleep(0)
                now = time.thread_time()
                longest, before = max(longest, now - before), now

        watching = asyncio.ensure_future(watch())
        asked = [
            asyncio.ensure_future(checks(Grammar(kind, spec), f"key-{i % 3}"))
            for i, (kind, spec) in enumerate(hostile)
        ]
        results = await asyncio.gather(*asked, return_exceptions=True)
        watching.cancel()
        assert {type(one) for one in results} <= {type(None), GrammarError}
        assert longest < 0.02

    run(body)


def test_tenants_take_turns() -> None:
    turns: Turns[int] = Turns()
    for tenant, item in (("a", 1), ("a", 2), ("b", 3), ("a", 4), ("c", 5)):
        turns.add(tenant, item)
    turns.remove("a", 4)
    assert turns.take(not_of=["a"]) == 3
    assert [turns.take() for _ in range(4)] == [1, 5, 2, None]
