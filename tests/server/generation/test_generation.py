"""How the sequences of one request go together, with an engine of a few lines."""

from __future__ import annotations

import asyncio
import unittest.mock
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import Tier
from pla_serve.server.engine.session import EngineSession
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.server.generation.generation import ChoiceDelta, Generation, GenerationPlan
from pla_serve.server.records.journal import JournalEntry, Journals
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.records.tier_metrics import TierWatch
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Inbound,
    Output,
    Rejected,
    SamplingParams,
)
from tests.server.server_harness import make_tokenizer

BYTES = TokenBytes(make_tokenizer())


class Engine:
    """Answers each message by calling ``react``, which may `reply`."""

    def __init__(self, react: Callable[[Engine, Inbound], None]) -> None:
        self._react = react
        self.added: list[AddRequest] = []
        self.aborted: list[str] = []
        self._routes: dict[str, EngineSession] = {}

    def open_route(self, id: str, session: EngineSession) -> None:
        self._routes[id] = session

    def close_route(self, id: str) -> None:
        self._routes.pop(id, None)

    def send(self, message: Inbound) -> None:
        if isinstance(message, AbortRequest):
            self.aborted.append(message.id)
        else:
            self.added.append(message)
        self._react(self, message)

    def reply(self, *messages: Any) -> None:
        for message in messages:
            if message.id in self._routes:
                self._routes[message.id].take(message)


def echo(engine: Engine, message: Inbound) -> None:
    """Takes a request and answers with its prompt, at once."""
    if isinstance(message, AddRequest):
        *most, last = message.prompt
        engine.reply(
            Accepted(message.id),
            Output(id=message.id, tokens=most, cached_tokens=len(most)),
            Output(id=message.id, tokens=[last], finish_reason="length"),
        )


def plan(*prompts: str, n: int = 1, stop: tuple[str, ...] = (), **sampling: Any) -> GenerationPlan:
    params = SamplingParams(max_tokens=9, **sampling)
    return GenerationPlan(
        id="x",
        cache_scope="",
        prompts=[list(prompt.encode()) for prompt in prompts],
        sampling=[params] * len(prompts),
        n=n,
        arrival=10.0,
        ttft_slo=0.5,
        tpot_slo=0.04,
        priority=3,
        stop=stop,
        include_stop=False,
        skip_special=True,
    )


def generate(
    engine: Engine, plan: GenerationPlan
) -> tuple[Generation, dict[int, str], dict[int, list[ChoiceDelta]]]:
    """Runs it to its end; returns the texts and deltas by choice."""

    async def main() -> Generation:
        session = EngineSession(engine, max_unread_tokens=100)
        generation = Generation(
            plan, session, BYTES, Metrics("m"), JournalEntry("r", 10.0), Journals(()), lambda: 11.0
        )
        try:
            await generation.admit()
            async for batch in generation.deltas():
                for delta in batch:
                    deltas.setdefault(delta.index, []).append(delta)
        finally:
            generation.close()
        return generation

    deltas: dict[int, list[ChoiceDelta]] = {}
    generation = asyncio.run(main())
    texts = {index: "".join(d.text for d in found) for index, found in deltas.items()}
    return generation, texts, deltas


def test_followers_wait_for_the_first_token() -> None:
    held: list[AddRequest] = []

    def react(engine: Engine, message: Inbound) -> None:
        assert isinstance(message, AddRequest)
        if held or message.id != "x-0":
            echo(engine, message)
            return
        held.append(message)
        engine.reply(Accepted(message.id))
        assert len(engine.added) == 1
        asyncio.get_running_loop().call_soon(echo, engine, message)

    engine = Engine(react)
    _, texts, _ = generate(engine, plan("ab", n=3))
    assert texts == {0: "ab", 1: "ab", 2: "ab"}
    assert [request.id for request in engine.added] == ["x-0", "x-1", "x-2"]


def test_only_the_first_has_the_deadline_and_the_seeds_differ() -> None:
    engine = Engine(echo)
    generate(engine, plan("ab", n=3, seed=2**63 - 2))
    seeds = [request.sampling.seed for request in engine.added]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [request.deadline for request in engine.added] == [10.5, None, None]
    assert [request.tpot for request in engine.added] == [0.04] * 3
    assert {request.service for request in engine.added} == {ServiceLevel.USUAL}
    assert [request.arrival for request in engine.added] == [10.0, 11.0, 11.0]
    assert {request.priority for request in engine.added} == {3}


def test_usage_counts_each_prompt_once() -> None:
    generation, _, _ = generate(Engine(echo), plan("ab", "cde", n=2))
    assert generation.usage() == {
        "prompt_tokens": 5,
        "completion_tokens": 10,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_follower_without_room_is_sent_again() -> None:
    refusals = iter([True, True, False])

    def react(engine: Engine, message: Inbound) -> None:
        if message.id == "x-1" and isinstance(message, AddRequest) and next(refusals):
            engine.reply(Rejected(id=message.id, reason="full", retry_after=0.001))
        else:
            echo(engine, message)

    engine = Engine(react)
    _, texts, _ = generate(engine, plan("ab", n=2))
    assert texts == {0: "ab", 1: "ab"}
    assert [request.id for request in engine.added] == ["x-0", "x-1", "x-1", "x-1"]


def test_refusal_of_one_prompt_refuses_the_batch_and_frees_the_others() -> None:
    def react(engine: Engine, message: Inbound) -> None:
        if message.id == "x-1":
            engine.reply(Rejected(id=message.id, reason="full", retry_after=2.5))
        else:
            engine.reply(Accepted(message.id))

    engine = Engine(react)
    with pytest.raises(ApiError, match="full") as caught:
        generate(engine, plan("a", "b", "c"))
    assert caught.value.status == 429
    assert caught.value.retry_after == 2.5
    assert sorted(engine.aborted) == ["x-0", "x-2"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_stop_string_cuts_at_the_same_token_however_tokens_come(chunk: int) -> None:
    tokens = list(b"one two three")

    def react(engine: Engine, message: Inbound) -> None:
        if isinstance(message, AddRequest):
            engine.reply(Accepted(message.id))
            for start in range(0, len(tokens), chunk):
                engine.reply(Output(id=message.id, tokens=tokens[start : start + chunk]))

    engine = Engine(react)
    generation, texts, deltas = generate(engine, plan("p", stop=("two",)))
    assert texts == {0: "one "}
    assert generation.completion_tokens == len("one two")
    assert sum(len(delta.tokens) for delta in deltas[0]) == len("one two")
    assert deltas[0][-1].finish_reason == "stop"
    assert deltas[0][-1].stop_reason == "two"
    assert engine.aborted == ["x-0"]


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    _, texts, deltas = generate(Engine(echo), plan("one tw", stop=("two",)))
    assert texts == {0: "one tw"}
    assert deltas[0][-1].finish_reason == "length"


def test_stop_token_is_counted_and_not_shown() -> None:
    def react(engine: Engine, message: Inbound) -> None:
        if isinstance(message, AddRequest):
            engine.reply(
                Output(id=message.id, tokens=[97, 46], finish_reason="stop", stop_token=46)
            )

    generation, texts, deltas = generate(Engine(react), plan("p", stop_token_ids=(46,)))
    assert texts == {0: "a"}
    assert deltas[0][-1].stop_reason == 46
    assert generation.completion_tokens == 2


def test_failure_of_one_choice_fails_the_request_and_frees_the_rest() -> None:
    def react(engine: Engine, message: Inbound) -> None:
        if isinstance(message, AddRequest):
            engine.reply(Accepted(message.id))
            if message.id == "x-1":
                engine.reply(Output(id="x-1", tokens=[], finish_reason="error", error="odd"))

    engine = Engine(react)
    with pytest.raises(ApiError, match="odd") as caught:
        generate(engine, plan("a", "b"))
    assert caught.value.status == 500
    assert engine.aborted == ["x-0"]


def counted(metrics: Metrics) -> dict[str, float]:
    """Choices by the reason they ended for, without zeros."""
    samples = {
        reason: metrics.registry.get_sample_value(
            "vllm:request_success_total", {"model_name": "m", "finished_reason": reason}
        )
        for reason in ("stop", "length", "abort", "error")
    }
    return {reason: value for reason, value in samples.items() if value}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("taken", [0, 1])
def test_choices_that_the_client_leaves_are_counted_once_as_aborted(n: int, taken: int) -> None:
    """Also those that wait for the first of their prompt; the finished choice is a stop."""

    def react(engine: Engine, message: Inbound) -> None:
        if isinstance(message, AddRequest):
            engine.reply(Accepted(message.id), Output(id=message.id, tokens=[97]))
            if message.id == "x-0" and taken:
                engine.reply(Output(id=message.id, tokens=[98], finish_reason="stop"))

    metrics = Metrics("m")

    async def main() -> None:
        session = EngineSession(Engine(react), max_unread_tokens=100)
        generation = Generation(
            plan("a", n=n), session, BYTES, metrics, JournalEntry("r", 10.0), Journals(())
        )
        await generation.admit()
        async for _ in generation.deltas():
            break
        generation.close()
        generation.close()

    asyncio.run(main())
    expected = {"stop": taken, "abort": n - taken}
    assert counted(metrics) == {reason: count for reason, count in expected.items() if count}


def test_choices_that_the_engine_fails_are_errors_and_refused_ones_are_neither() -> None:
    def react(engine: Engine, message: Inbound) -> None:
        if isinstance(message, AddRequest) and message.prompt == [97]:
            engine.reply(Accepted(message.id))
            engine.reply(Output(id=message.id, tokens=[], finish_reason="error", error="odd"))
        elif isinstance(message, AddRequest):
            engine.reply(Rejected(id=message.id, reason="full", retry_after=1.0))

    for prompt, expected in (("a", {"error": 2.0}), ("b", {})):
        metrics = Metrics("m")

        async def main(prompt: str = prompt, metrics: Metrics = metrics) -> None:
            session = EngineSession(Engine(react), max_unread_tokens=100)
            generation = Generation(
                plan(prompt, n=2), session, BYTES, metrics, JournalEntry("r", 10.0), Journals(())
            )
            try:
                await generation.admit()
                async for _ in generation.deltas():
                    pass
            finally:
                generation.close()

        with pytest.raises(ApiError):
            asyncio.run(main())
        assert counted(metrics) == expected


def test_journal_tells_where_an_answer_went_on_elsewhere() -> None:
    """The second instance says of its first token how long it queued, as the first one did."""

    def reply(engine: Engine, message: Any) -> None:
        if isinstance(message, AddRequest):
            engine.reply(Accepted(message.id), Output(id=message.id, tokens=[97], queued=0.25))
            asyncio.get_running_loop().call_later(
                0.01,
                engine.reply,
                Output(id=message.id, tokens=[98], queued=0.5, finish_reason="length"),
            )

    entry = JournalEntry("r", 10.0)

    async def main() -> None:
        session = EngineSession(Engine(reply), max_unread_tokens=100)
        generation = Generation(
            plan("ab"), session, BYTES, Metrics("m"), entry, Journals(()), lambda: 11.0
        )
        await generation.admit()
        async for _ in generation.deltas():
            pass
        generation.close()

    asyncio.run(main())
    assert entry.prefill_began == 10.25
    assert entry.moved == (11.0, 11.0)
    assert (entry.outcome, entry.completion_tokens) == ("length", 2)


class TestTiers:
    """Of a plan that arrives at 10; the clock stands at 11."""

    def outcomes(self, plan: GenerationPlan) -> dict[str, float]:
        """Serve it; returns the outcomes that were counted."""
        engine = Engine(echo)
        metrics = Metrics("m")

        async def main() -> None:
            session = EngineSession(engine, max_unread_tokens=100)
            entry, journal = JournalEntry("r", 10.0), Journals(())
            generation = Generation(plan, session, BYTES, metrics, entry, journal, lambda: 11.0)
            try:
                await generation.admit()
                async for _ in generation.deltas():
                    pass
            finally:
                generation.close()
                generation.close()

        asyncio.run(main())
        self.services = [request.service for request in engine.added]
        return {
            sample.labels["outcome"]: sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == "pla_serve:tier_requests_total"
        }

    @pytest.mark.parametrize(
        ("ttft", "tpot", "outcome"),
        [
            (2.0, 0.04, "met"),
            (0.5, 0.04, "late_first_token"),
            (0.999, 0.04, "late_first_token"),
            (None, 0.04, "met"),
            (None, None, "met"),
        ],
    )
    def test_what_became_of_the_promise(
        self, ttft: float | None, tpot: float | None, outcome: str
    ) -> None:
        tiered = replace(plan("abc"), tier=Tier("t", 9.0, 9.0), ttft_slo=ttft, tpot_slo=tpot)
        assert self.outcomes(tiered) == {outcome: 1}

    def test_only_the_first_choice_of_a_prompt_is_refused_for_its_promise(self) -> None:
        self.outcomes(replace(plan("abc", n=3), tier=Tier("t", 9.0, 9.0)))
        assert self.services == [ServiceLevel.PROMISED, ServiceLevel.USUAL, ServiceLevel.USUAL]
        self.outcomes(replace(plan("abc", n=2), tier=Tier("t")))
        assert self.services == [ServiceLevel.BULK, ServiceLevel.BULK]

    def test_tokens_are_late_by_the_deadlines_of_the_first(self) -> None:
        """Token i is due i targets after the first was due, so what is ahead buys a pause."""
        metrics = Metrics("m")
        tier = Tier("t", 1.0, 0.1)
        for times, outcome in (
            ([0.2, 1.0, 1.19], "met"),
            ([0.2, 1.0, 1.25], "late_token"),
            ([0.2, 1.15, 1.19], "late_token"),
            ([1.1, 1.1, 1.2], "late_first_token"),
        ):
            watch = TierWatch(metrics.tiers, tier, 10.0, tier.ttft, tier.tpot)
            for number, after in enumerate(times):
                watch.tokens(0, leads=True, before=number, count=1, now=10.0 + after)
            with unittest.mock.patch.object(metrics.tiers, "ended") as ended:
                watch.ended(refused=False, finished=True)
            ended.assert_called_once_with(tier, outcome)

    def test_tokens_that_come_together_are_as_late_as_the_first_of_them(self) -> None:
        metrics, tier = Metrics("m"), Tier("t", None, 0.1)
        for now, finished, outcome in ((0.15, True, "late_token"), (0.1, False, "unfinished")):
            watch = TierWatch(metrics.tiers, tier, 10.0, None, tier.tpot)
            watch.tokens(0, leads=True, before=0, count=1, now=12.0)
            watch.tokens(0, leads=True, before=1, count=5, now=12.0 + now)
            watch.tokens(0, leads=True, before=6, count=0, now=99.0)
            with unittest.mock.patch.object(metrics.tiers, "ended") as ended:
                watch.ended(refused=False, finished=finished)
            ended.assert_called_once_with(tier, outcome)
