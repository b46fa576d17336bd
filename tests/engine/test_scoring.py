"""Log probabilities of prompts equal those of the stock model, whatever the schedule does."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.engine.run import scoring
from pla_serve.wire.engine import HandOver, Output, TokenLogprob
from tests.engine.chaos import ChaosPolicy
from tests.engine.test_outputs import assert_at_rest, prompts
from tests.engine.tiny import (
    BLOCK,
    SAMPLE,
    VOCABULARY,
    Engine,
    expected,
    make_engine,
    reference_model,
)

PATIENT = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS = 5


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut scores into slices of three tokens."""
    monkeypatch.setattr(scoring, "SLICE_LOGITS", 3 * VOCABULARY)


def right_scores(name: str, prompt: tuple[int, ...]) -> torch.Tensor:
    """(tokens - 1, vocabulary): log probabilities after each token of the prompt but the last."""
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(name)(torch.tensor([prompt])).logits[0, :-1]
    return logits.log_softmax(-1)


def first_output(engine: Engine, request_id: str) -> Output:
    return engine.outputs(request_id)[0]


def assert_scores(name: str, prompt: tuple[int, ...], output: Output, top: int) -> None:
    """Compare with the stock model; ranks may differ where values nearly do not."""
    assert output.prompt_logprobs is not None
    entries = list(output.prompt_logprobs.entries())
    right = right_scores(name, prompt)
    assert len(entries) == len(output.prompt_logprobs) == len(prompt) - 1
    for row, token, entry in zip(right, prompt[1:], entries, strict=True):
        assert_entry(row, token, entry, top)


def assert_entry(row: torch.Tensor, token: int, entry: TokenLogprob, top: int) -> None:
    assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
    better = int((row > row[token] + 2e-3).sum())
    near = int((row > row[token] - 2e-3).sum())
    assert better < entry.rank <= near
    assert [value for _, value in entry.top] == pytest.approx(
        row.topk(top).values.tolist(), abs=1e-3
    )
    for other, value in entry.top:
        assert value == pytest.approx(float(row[other]), abs=1e-3)


@pytest.mark.parametrize("name", SAMPLE)
@PATIENT
@given(seed=st.integers(0, 2**32), cached=st.booleans(), tight=st.booleans())
def test_random_schedules(name: str, seed: int, cached: bool, tight: bool) -> None:
    rng = Random(seed)
    engine = make_engine(
        name, ChaosPolicy(seed), blocks=rng.randint(30, 60) if tight else 256, prefix_cache=cached
    )
    wanted = {f"r{i}": prompt for i, prompt in enumerate(prompts(rng, 6))}
    tops = {each: rng.choice((None, 0, 1, 4)) for each in wanted}
    tokens = {each: rng.choice((0, TOKENS)) for each in wanted}
    waiting = list(wanted)

    def arrive() -> None:
        while waiting and rng.random() < 0.4:
            request_id = waiting.pop(0)
            engine.add(
                request_id,
                wanted[request_id],
                max_tokens=tokens[request_id],
                prompt_logprobs=tops[request_id],
            )

    engine.on_poll.append(arrive)
    while waiting:
        engine.run()
    engine.on_poll.clear()
    engine.run()
    for request_id, prompt in wanted.items():
        output, top = first_output(engine, request_id), tops[request_id]
        assert engine.tokens(request_id) == expected(name, prompt, TOKENS)[: tokens[request_id]]
        if top is None:
            assert output.prompt_logprobs is None
        else:
            assert_scores(name, prompt, output, top)
            assert all(more.prompt_logprobs is None for more in engine.outputs(request_id)[1:])
        if not tokens[request_id]:
            assert output.finish_reason == "length"
    assert_at_rest(engine)


def test_a_scored_prompt_that_is_cached_is_computed_again() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    prompt = tuple(range(1, 42))
    engine.add("first", prompt)
    engine.run()
    engine.add("scored", prompt, prompt_logprobs=2)
    engine.run()
    output = first_output(engine, "scored")
    assert output.cached_tokens == 0
    assert_scores("llama", prompt, output, 2)
    engine.add("after", prompt)
    engine.run()
    assert first_output(engine, "after").cached_tokens == 40


def test_what_is_scored_is_not_computed_again_after_a_preemption() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("r", tuple(range(1, 42)), prompt_logprobs=0)
    engine.loop._inbox.take()
    sequence = engine.loop._requests.get("r")
    assert sequence is not None
    assert sequence.reusable == 0
    rows = torch.zeros(10, VOCABULARY)
    sequence.scores.append(scoring.score_tokens(rows, torch.zeros(10, dtype=torch.int64), 0))
    assert sequence.reusable == 10
    sequence.scores.append(scoring.score_tokens(rows.expand(10, -1), torch.arange(10), 0))
    sequence.scores += sequence.scores
    assert sequence.scored == 40
    assert sequence.reusable == 40, "all but the last token, as without scores"


def test_a_prompt_of_one_token_has_no_scores() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("r", (5,), prompt_logprobs=3, max_tokens=0)
    engine.run()
    scores = first_output(engine, "r").prompt_logprobs
    assert scores is not None
    assert list(scores.entries()) == []


def test_a_prompt_that_fills_the_context_can_be_scored() -> None:
    engine = make_engine("llama", ChaosPolicy(1), max_model_len=64)
    prompt = tuple(1 + i % 90 for i in range(64))
    engine.add("full", prompt, prompt_logprobs=1, max_tokens=0)
    engine.add("more", prompt, prompt_logprobs=1)
    engine.run()
    assert_scores("llama", prompt, first_output(engine, "full"), 1)
    rejected = engine.rejected("more")
    assert rejected is not None
    assert "64 tokens" in rejected.reason


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    monkeypatch.setattr("pla_serve.engine.requests.admission.MOST_PROMPT_LOGPROBS", 100)
    engine.add("many", range(1, 52), prompt_logprobs=1)
    engine.run()
    rejected = engine.rejected("many")
    assert rejected is not None
    assert "102 log probabilities" in rejected.reason


def test_it_is_not_handed_over() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("r", (1, 2, 3), prompt_logprobs=1)
    request = engine.inbox.pop()
    moved = type(request)(
        id="moved",
        prompt=request.prompt,
        sampling=request.sampling,
        arrival=0.0,
        hand_over=HandOver(lease_seconds=1.0),
    )
    verdict = engine.parts.intake.admit(moved, 0.0)
    assert "not handed over" in verdict.reason
    assert "not handed over" in engine.parts.intake.take_over(request).reason


def test_a_continued_request_is_not_scored_again() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    prompt = tuple(range(1, 2 * BLOCK))
    begun = expected("llama", prompt, 2)[:1]
    engine.add("r", (*prompt, *begun), prompt_logprobs=1)
    request = engine.inbox.pop()
    engine.inbox.append(
        type(request)(
            id="r",
            prompt=request.prompt,
            sampling=request.sampling,
            arrival=0.0,
            generated=len(begun),
        )
    )
    engine.run()
    assert first_output(engine, "r").prompt_logprobs is None
