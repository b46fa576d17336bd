"""A request finds nothing of another cache scope, neither in tokens nor in how it is scheduled."""

from __future__ import annotations

import msgspec

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.wire.engine import AddRequest, SamplingParams
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import BLOCK, Engine, expected, make_engine

PROMPT = tuple(range(1, 71))
WHOLE = (len(PROMPT) - 1) // BLOCK * BLOCK


def send(engine: Engine, name: str, scope: str, prompt: tuple[int, ...] = PROMPT) -> int | None:
    """Run one request; the tokens that it found in the cache, as it reports them."""
    engine.inbox.append(
        AddRequest(
            id=name,
            prompt=list(prompt),
            sampling=SamplingParams(max_tokens=8, temperature=0.0),
            arrival=engine.clock(),
            cache_scope=scope,
        )
    )
    engine.run()
    assert engine.tokens(name) == expected("llama", prompt, 8)
    return engine.outputs(name)[0].cached_tokens


def test_what_one_scope_sent_is_not_found_in_another() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    assert send(engine, "first", "a") == 0
    assert send(engine, "again", "a") == WHOLE
    for scope in ("", "b", "aa"):
        assert send(engine, f"other {scope}", scope) == 0


def test_another_scope_computes_the_whole_prompt_and_waits_as_such() -> None:
    """Its class and its predicted time are those of a prompt that nobody has sent before."""
    engine = make_engine("llama", ChaosPolicy(0))
    send(engine, "first", "a")
    request = AddRequest(
        id="x",
        prompt=list(PROMPT),
        sampling=SamplingParams(max_tokens=8),
        arrival=engine.clock(),
    )
    seen = {}
    for scope in ("a", "b"):
        scoped = msgspec.structs.replace(request, id=scope, cache_scope=scope)
        admitted = engine.parts.intake.admit(scoped, engine.clock())
        assert isinstance(admitted, Sequence)
        prefill = admitted.prefill(admitted.seen_cached)
        seen[scope] = (prefill.new_tokens, prefill.history)
    assert seen == {"a": (len(PROMPT) - WHOLE, WHOLE), "b": (len(PROMPT), 0)}
    before = engine.loop._telemetry.prompt_tokens
    send(engine, "second", "b")
    assert engine.loop._telemetry.prompt_tokens - before == len(PROMPT)


def test_turns_of_one_scope_build_on_each_other() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    send(engine, "turn 1", "a")
    answer = engine.tokens("turn 1")
    follow_up = (*PROMPT, *answer, 5, 6)
    whole = (len(PROMPT) + len(answer) - 1) // BLOCK * BLOCK
    assert send(engine, "turn 2", "a", follow_up) == whole
