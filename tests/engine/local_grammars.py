"""Grammars whose code runs in the process of the test: the compiler itself, without workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pla_serve.engine.sampling.grammars import GrammarFollower, as_masks
from pla_serve.grammar.compiler import GrammarCompiler, GrammarMatcher
from pla_serve.wire.engine import Grammar


class LocalFollower:
    """A `GrammarFollower` that knows everything at once."""

    settled = ready = True
    lags = False

    def __init__(self, matcher: GrammarMatcher, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._matcher = matcher

    @property
    def error(self) -> str | None:
        return self._matcher.error

    @property
    def finished(self) -> bool:
        return self._matcher.finished

    @property
    def must_stop(self) -> bool:
        return self._matcher.must_stop

    def advance(self, token: int) -> None:
        self._matcher.advance(token)

    def mask(self) -> bytes:
        return self._matcher.mask()

    def close(self) -> None: ...


class LocalGrammars:
    """`Grammars` that are never late."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler

    def start(self, grammar: Grammar, tenant: str = "") -> LocalFollower:
        return LocalFollower(self._compiler.start(grammar), self._compiler.eos_token_ids)

    def open(self, follower: GrammarFollower) -> None: ...

    def settle(self, followers: Sequence[GrammarFollower]) -> None: ...

    def prepare(self, followers: Sequence[GrammarFollower]) -> None: ...

    def masks(self, followers: Sequence[GrammarFollower]) -> torch.Tensor:
        rows = []
        for one in followers:
            assert isinstance(one, LocalFollower)
            rows.append(one.mask())
        return as_masks(rows)

    def poll(self) -> None: ...
