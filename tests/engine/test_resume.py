"""A request that another engine began goes on here exactly as it would have gone on there."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import AddRequest, EngineStats, Grammar, Output, SamplingParams
from tests.engine.tiny import VOCABULARY, Engine, expected, grammar_compiler, make_engine

TOKENS = 14
PROMPT = tuple(range(3, 20))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA))
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 1.3, "seed": 6, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties": {
        "temperature": 0.9,
        "seed": 7,
        "presence_penalty": 1.2,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.4,
    },
    "greedy penalties": {"repetition_penalty": 1.8, "frequency_penalty": 0.5},
    "grammar": {"temperature": 1.0, "seed": 8, "grammar": GRAMMAR, "max_tokens": 60},
    "grammar and penalties": {
        "temperature": 1.1,
        "seed": 9,
        "grammar": GRAMMAR,
        "repetition_penalty": 1.2,
        "max_tokens": 60,
    },
    "min_tokens": {"min_tokens": 10, "logit_bias": {0: 8.0}},
    "logprobs": {"logprobs": 3, "temperature": 0.8, "seed": 10},
}


def engine() -> Engine:
    policy = create_policy("length-aware", PolicyConfig(max_batch_tokens=64), CostModel())
    return make_engine("llama", policy, grammars=grammar_compiler())


def serve(
    prompt: tuple[int, ...], generated: int, crowd: int = 0, **sampling: Any
) -> tuple[Engine, list[Output]]:
    """The outputs of one request on a fresh engine, beside some others."""
    made = engine()
    rng = Random(crowd)
    for other in range(crowd):
        made.add(f"c{other}", [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 40))])
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": TOKENS, **sampling})
    made.inbox.append(
        AddRequest(
            id=f"r-{generated}",
            prompt=list(prompt),
            sampling=params,
            arrival=made.clock(),
            generated=generated,
        )
    )
    made.run()
    return made, made.outputs(f"r-{generated}")


def tokens(outputs: list[Output]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_cut_continues_as_the_uncut_run(kind: str, data: st.DataObject) -> None:
    prompt = data.draw(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40).map(tuple))
    _, whole = serve(prompt, 0, **KINDS[kind])
    right = tokens(whole)
    if len(right) < 2:
        return
    cut = data.draw(st.integers(1, len(right) - 1))
    crowd = data.draw(st.integers(0, 3))
    _, rest = serve(prompt + right[:cut], cut, crowd, **KINDS[kind])
    assert right[:cut] + tokens(rest) == right
    last, once = rest[-1], whole[-1]
    assert (last.finish_reason, last.stop_token) == (once.finish_reason, once.stop_token)
    for here, there in zip(rest, whole[cut:], strict=True):
        for one, other in zip(here.logprobs or [], there.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert one.rank == other.rank


def test_the_cut_is_in_the_tokens_not_in_the_seed() -> None:
    """The penalties and the random numbers would differ if output counted as prompt."""
    _, whole = serve(PROMPT, 0, **KINDS["penalties"])
    right = tokens(whole)
    _, wrong = serve(PROMPT + right[:5], 0, **KINDS["penalties"])
    assert tokens(wrong)[: len(right) - 5] != right[5:]


def test_a_stop_id_ends_it_as_before() -> None:
    right = expected("llama", PROMPT, TOKENS)
    stop = right[9]
    where = right.index(stop)
    _, whole = serve(PROMPT, 0, stop_token_ids=(stop,))
    _, rest = serve(PROMPT + right[:where], where, stop_token_ids=(stop,))
    assert tokens(whole) == right[: where + 1]
    assert tokens(rest) == (stop,)
    assert rest[-1].finish_reason == "stop"
    assert rest[-1].stop_token == stop


def test_what_is_resumed_counts_as_no_first_token() -> None:
    right = expected("llama", PROMPT, TOKENS)
    made, rest = serve(PROMPT + right[:4], 4)
    stats = [message for message in made.emitted if isinstance(message, EngineStats)]
    assert not any(report.firsts for report in stats)
    assert rest[0].cached_tokens == 0
    assert stats[-1].generation_tokens == TOKENS - 4


@pytest.mark.parametrize(
    ("generated", "sampling", "reason"),
    [
        (-1, {}, "generated says that -1 of 17"),
        (17, {}, "at least one of them must be prompt"),
        (4, {"max_tokens": 4}, "nothing is left to make: 4 of 4"),
        (4, {"stop_token_ids": (19,)}, "nothing is left to make: the output has ended with 19"),
        (4, {"grammar": GRAMMAR}, "the output so far does not fit the request"),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_reason(
    generated: int, sampling: dict[str, Any], reason: str
) -> None:
    made, outputs = serve(PROMPT, generated, **sampling)
    refused = made.rejected(f"r-{generated}")
    assert refused is not None
    assert reason in refused.reason
    assert refused.retry_after is None
    assert not outputs
