"""Sequences whose grammar is late sit steps out, and come to the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.sampling import Sampler
from pla_serve.engine.sampling.grammars import GrammarFollower
from pla_serve.wire.engine import Grammar, Output
from tests.engine.chaos import ChaosPolicy
from tests.engine.local_grammars import LocalFollower, LocalGrammars
from tests.engine.test_outputs import assert_at_rest
from tests.engine.tiny import VOCABULARY, Engine, grammar_compiler, make_engine

GRAMMARS = [
    Grammar("regex", "[a-d]{2,9}"),
    Grammar("json_object"),
    Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}})),
    Grammar("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'),
]


class Tardy(LocalFollower):
    """Answers after so many polls."""

    def __init__(self, inner: LocalFollower, rng: Random, share: float) -> None:
        self.__dict__.update(inner.__dict__)
        self._rng, self._share = rng, share
        self.verdict_in = self.mask_in = 0
        self.broken: str | None = None
        self._think()

    @property
    def error(self) -> str | None:
        return self.broken or super().error

    @property
    def settled(self) -> bool:  # type: ignore[override]
        return self.error is not None or self.verdict_in == 0

    @property
    def ready(self) -> bool:  # type: ignore[override]
        return self.error is not None or self.verdict_in == self.mask_in == 0

    def advance(self, token: int) -> None:
        super().advance(token)
        self._think()

    def _think(self) -> None:
        rng = self._rng
        self.verdict_in = rng.randint(1, 3) if rng.random() < self._share / 2 else 0
        self.mask_in = rng.randint(1, 9) if rng.random() < self._share else 0


class TardyGrammars(LocalGrammars):
    """The same grammars, late at random."""

    def __init__(self, seed: int, share: float) -> None:
        super().__init__(grammar_compiler()._compiler)
        self.rng, self.share = Random(seed), share
        self.followers: list[Tardy] = []

    def start(self, grammar: Grammar, tenant: str = "") -> Tardy:
        self.followers.append(Tardy(super().start(grammar), self.rng, self.share))
        return self.followers[-1]

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        assert all(one.ready for one in followers)
        return super().masks(followers)

    def poll(self) -> None:
        for one in self.followers:
            one.verdict_in = max(0, one.verdict_in - 1)
            one.mask_in = max(0, one.mask_in - 1)


def ask(engine: Engine, seed: int) -> list[str]:
    """Requests with and without grammars; their ids."""
    rng = Random(seed)
    ids = [f"r{i}" for i in range(5)]
    for index, id in enumerate(ids):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 60))]
        grammar = rng.choice([None, *GRAMMARS])
        engine.add(
            id,
            prompt,
            max_tokens=rng.randint(1, 16),
            temperature=rng.choice((0.0, 1.0)),
            seed=index,
            grammar=grammar,
        )
    return ids


def answers(engine: Engine, ids: list[str]) -> list[tuple[object, ...]]:
    return [
        (engine.tokens(id), engine.outputs(id)[-1].finish_reason, engine.outputs(id)[-1].error)
        for id in ids
    ]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.1, 0.5, 1.0]), tight=st.booleans())
def test_late_grammars_change_no_token(seed: int, share: float, tight: bool) -> None:
    blocks = 40 if tight else 256
    results = []
    for grammars in (grammar_compiler(), TardyGrammars(seed, share)):
        policy = ChaosPolicy(seed, express=0.4)
        engine = make_engine("llama", policy, blocks=blocks, grammars=grammars)
        ids = ask(engine, seed)
        engine.run()
        assert_at_rest(engine)
        results.append(answers(engine, ids))
    assert results[0] == results[1]


def test_a_sequence_that_sits_out_holds_up_nobody_and_can_be_aborted() -> None:
    grammars = TardyGrammars(1, 1.0)
    engine = make_engine("llama", ChaosPolicy(1, express=0.0), grammars=grammars)
    engine.add("late", [5, 6, 7], grammar=Grammar("regex", "[ab]{30}"), max_tokens=40)
    engine.add("plain", [8, 9], max_tokens=12, ignore_eos=True)
    grammars.poll = lambda: None  # type: ignore[method-assign]
    for _ in range(60):
        engine.loop.step()
    assert len(engine.tokens("plain")) == 12
    assert engine.outputs("late") == []
    pause = engine.loop.step()
    assert pause is not None
    assert 0 < pause < 0.01
    engine.abort("late")
    engine.run()
    assert_at_rest(engine)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_grammar_that_fails_while_its_sequence_sits_out_ends_that_one(tokens: int) -> None:
    grammars = TardyGrammars(2, 0.0)
    engine = make_engine("llama", ChaosPolicy(2, express=0.0), grammars=grammars)
    engine.add("bad", [5, 6, 7], grammar=Grammar("regex", "[ab]{30}"), max_tokens=40)
    engine.add("plain", [8, 9], max_tokens=30, ignore_eos=True)
    while len(engine.tokens("bad")) < tokens or not grammars.followers:
        engine.loop.step()
    grammars.followers[0].mask_in = 10**6
    for _ in range(9):
        engine.loop.step()
    grammars.followers[0].broken = "it takes more than 1 s"
    engine.run()
    assert_at_rest(engine)
    last = engine.outputs("bad")[-1]
    assert isinstance(last, Output)
    assert (last.finish_reason, last.error) == ("error", "it takes more than 1 s")
    assert last.fault == "request"
    assert len(engine.tokens("plain")) == 30


def test_an_engine_fault_is_not_the_requests() -> None:
    engine = make_engine("llama", ChaosPolicy(3, express=0.0))
    sampler = engine.parts.sampler
    assert isinstance(sampler, Sampler)
    choose = sampler.choose
    sampler.choose = lambda logits, rows: choose(logits * torch.nan, rows)  # type: ignore[method-assign]
    engine.add("x", [5, 6, 7])
    engine.run()
    assert engine.outputs("x")[-1].fault == "engine"
