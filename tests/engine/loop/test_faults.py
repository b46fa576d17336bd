"""An exception that belongs to one request ends that request, and the others do not notice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pla_serve.engine.loop import settle
from pla_serve.engine.loop.prepare import BatchPreparation
from pla_serve.engine.sampling import SequenceSampling
from pla_serve.engine.sampling import sampler as sampler_module
from pla_serve.engine.sampling.penalties import TokenCounts
from pla_serve.wire.engine import Grammar, Output, Rejected
from tests.engine.chaos import ChaosPolicy
from tests.engine.local_grammars import LocalFollower
from tests.engine.test_outputs import assert_at_rest
from tests.engine.tiny import Engine, grammar_compiler, make_engine

BAD_PROMPT = [7] * 9
BAD_SEED = 4242
"""By these the injected faults know the request that they are for."""
OTHERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 1, "top_p": 0.9, "top_k": 20},
    "penalised": {"temperature": 0.8, "seed": 2, "frequency_penalty": 0.5},
    "biased": {"temperature": 1.0, "seed": 3, "logit_bias": {5: 3.0}},
    "told": {"logprobs": 2},
    "grammar": {"temperature": 1.0, "seed": 5, "grammar": Grammar("regex", "[a-d]{2,9}")},
}
BAD: dict[str, Any] = {
    "temperature": 1.0,
    "seed": BAD_SEED,
    "frequency_penalty": 1.0,
    "logit_bias": {9: 1.0},
    "logprobs": 1,
    "top_k": 7,
}


class Injected(Exception):
    """Raised by a test only."""


def is_bad(sequence: Any) -> bool:
    return bool(sequence.params.seed == BAD_SEED)


def raising(original: Callable[..., Any], guilty: Callable[..., bool]) -> Callable[..., Any]:
    """The function, but for calls on behalf of the bad request."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if guilty(*args, **kwargs):
            raise Injected("boom")
        return original(*args, **kwargs)

    return call


def of_row(self: SequenceSampling, *_: Any, **__: Any) -> bool:
    return is_bad(self)


def of_sequence(_: Any, sequence: Any, *__: Any, **___: Any) -> bool:
    return is_bad(sequence.sampling)


def patch(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject one fault."""

    def on(owner: Any, attribute: str, guilty: Callable[..., bool]) -> None:
        monkeypatch.setattr(owner, attribute, raising(getattr(owner, attribute), guilty))

    kv, module = engine.parts.kv, sampler_module
    match name:
        case "draw":
            on(module, "draw", lambda _l, _p, params, _u: any(p.seed == BAD_SEED for p in params))
        case "random number":
            on(SequenceSampling, "uniform", of_row)
        case "penalties":
            on(
                module,
                "penalise",
                lambda _, rows: any(p.frequency == BAD["frequency_penalty"] for _, p in rows),
            )
        case "logit_bias":
            on(module, "add_to_logits", lambda _, rows: any(9 in one.ids for _, one in rows))
        case "logprobs":
            on(module, "token_logprobs", lambda _l, _t, tops: 1 in tops)
        case "minimum":
            on(SequenceSampling, "forbidden", of_row)
        case "propose":
            on(SequenceSampling, "propose", of_row)
        case "count":
            on(TokenCounts, "add", lambda counts, _: counts is bad_counts(engine))
        case "settle":
            on(SequenceSampling, "settle", of_row)
        case "stop":
            on(settle, "take_token", lambda one, *_: is_bad(one.sampling))
        case "register KV":
            on(kv, "remember", lambda tokens, *_, **__: tokens[:9] == BAD_PROMPT)
        case "reserve KV":
            on(kv, "reserve", lambda tokens, *_, **__: tokens[:9] == BAD_PROMPT)
        case "grow KV":
            on(kv, "grow", lambda table, _: table is bad_table(engine))
        case "lay out":
            on(BatchPreparation, "_join", lambda _, chunk, *__: chunk.request_id == "bad")
        case "queue":
            on(engine.parts.policy, "add", lambda request, _: request.id == "bad")
        case "decode":
            on(engine.parts.policy, "start_decode", lambda id, *_: id == "bad")
        case "emit":
            emit = engine.emitted.append
            context = engine.loop._settlement._context
            guilty = raising(emit, lambda m: isinstance(m, Output) and m.id == "bad" and m.tokens)
            replaced = SimpleNamespace(
                **{n: getattr(context, n) for n in ("parts", "clock", "telemetry")}, emit=guilty
            )
            monkeypatch.setattr(engine.loop._settlement, "_context", replaced)
        case "admit":
            on(engine.parts.sampler, "start", lambda id, *_, **__: id == "bad")
        case _:
            raise AssertionError(name)


def bad_counts(engine: Engine) -> Any:
    sequence = engine.loop._requests.get("bad")
    assert sequence is None or sequence.sampling.penalties is not None
    return None if sequence is None else sequence.sampling.penalties.seen  # type: ignore[union-attr]


def bad_table(engine: Engine) -> Any:
    sequence = engine.loop._requests.get("bad")
    return None if sequence is None else sequence.table


def ask(engine: Engine) -> None:
    for index, (name, params) in enumerate(OTHERS.items()):
        engine.add(name, list(range(10 + index, 30 + 3 * index)), max_tokens=9, **params)


def answers(engine: Engine) -> dict[str, Any]:
    """Tokens, reasons and log probabilities, but for what rounding makes of the latter."""
    return {
        name: (
            engine.tokens(name),
            engine.outputs(name)[-1].finish_reason,
            [[t.rank for t in o.logprobs or ()] for o in engine.outputs(name)],
        )
        for name in OTHERS
    }


FAULTS = {
    "draw": "request",
    "random number": "request",
    "penalties": "request",
    "logit_bias": "request",
    "logprobs": "request",
    "minimum": "request",
    "propose": "request",
    "count": "request",
    "settle": "request",
    "stop": "engine",
    "register KV": "engine",
    "reserve KV": "engine",
    "grow KV": "engine",
    "lay out": "engine",
    "queue": "engine",
    "decode": "engine",
    "emit": "engine",
    "admit": None,
}
"""Where it goes wrong, and whose fault the client is told it is; None for a refusal."""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_fault_of_one_request_ends_that_one_alone(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_engine("llama", ChaosPolicy(seed, express=0.4), grammars=grammar_compiler())
    ask(alone)
    alone.run()
    engine = make_engine("llama", ChaosPolicy(seed, express=0.4), grammars=grammar_compiler())
    patch(name, engine, monkeypatch)
    engine.add("bad", BAD_PROMPT, max_tokens=9, **BAD)
    ask(engine)
    engine.run()
    assert answers(engine) == answers(alone)
    assert_at_rest(engine)
    if FAULTS[name] is None:
        refused = engine.rejected("bad")
        assert refused is not None
        assert "Injected" in refused.reason
        return
    last = engine.outputs("bad")[-1]
    assert last.finish_reason == "error"
    assert last.fault == FAULTS[name]
    assert last.error is not None
    assert "Injected" in last.error
    assert "boom" not in last.error, "clients learn nothing of the inside"


def test_a_grammar_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where masks are applied, and where tokens are passed to the grammar."""
    for method in ("mask", "advance"):
        grammars = grammar_compiler()
        engine = make_engine("llama", ChaosPolicy(1, express=0.0), grammars=grammars)
        engine.add("bad", BAD_PROMPT, grammar=Grammar("regex", "zzz"), max_tokens=5)
        ask(engine)
        engine.loop._inbox.take()
        sequence = engine.loop._requests.get("bad")
        assert sequence is not None
        follower = sequence.sampling.grammar
        original = getattr(LocalFollower, method)
        with monkeypatch.context() as patched:
            patched.setattr(
                LocalFollower,
                method,
                raising(original, lambda one, *_, guilty=follower: one is guilty),
            )
            engine.run()
        assert engine.outputs("bad")[-1].fault == "request"
        assert all(engine.outputs(name)[-1].finish_reason != "error" for name in OTHERS)
        assert_at_rest(engine)


def test_an_abort_that_raises_ends_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", ChaosPolicy(1, express=0.0), grammars=grammar_compiler())
    ask(engine)
    forecast = engine.parts.intake.settle_forecast
    calls: list[str] = []

    def settle_forecast(sequence: Any, now: float, *, served: bool) -> None:
        if sequence.id == "greedy" and not served and not calls:
            calls.append(sequence.id)
            raise Injected
        forecast(sequence, now, served=served)

    monkeypatch.setattr(engine.parts.intake, "settle_forecast", settle_forecast)
    engine.loop.step()
    engine.abort("greedy")
    engine.run()
    assert calls
    assert_at_rest(engine)
    assert not any(isinstance(one, Rejected) for one in engine.emitted)


def test_a_lost_device_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", ChaosPolicy(1, express=0.0), grammars=grammar_compiler())
    ask(engine)

    def lose(*_: Any) -> None:
        raise torch.AcceleratorError("the device is gone")

    monkeypatch.setattr(sampler_module, "draw", lose)
    with pytest.raises(torch.AcceleratorError):
        engine.run()
