"""A deterministic engine core without a model: the double behind the tests of the API.

It echoes the prompt, ``TOKENS_PER_STEP`` tokens a step, and ends with EOS after one echo, or never
with ``ignore_eos``. Seeds stand for faults; see the constants.

With ``FAKE_SCRIPTS``, a JSON file of texts and lists of answers, it follows a script instead: the
first whose text is in the prompt. The first turn after that text gets the first answer, and so on.
A prompt has a turn for each `TURN`, which the chat template has to write before each message of the
assistant.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pla_serve.engine.config import EngineConfig
from pla_serve.policy.cost import CostProfile
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    EngineLoad,
    EngineReady,
    EngineStats,
    Inbound,
    LatencySample,
    Outbound,
    Output,
    PromptLogprobs,
    Rejected,
    TokenLogprob,
)

EOS = 256
VOCAB = 260
TURN = "[assistant]"
REJECT_SEED = 429
"""Refused, retry after 1.5 s."""
REJECT_FOR_GOOD_SEED = 400
CRASH_SEED = 666
"""The core raises after the first token."""
ERROR_SEED = 500
"""The request fails after the first token, with finish_reason error."""
SILENT_SEED = 7777
"""Accepted, then nothing until it is aborted."""
GATED_SEED = 8888
"""The first token at once, the others when the file FAKE_GATE exists."""


@dataclass
class Running:
    request: AddRequest
    script: list[int]
    cached: int
    made: int = 0


@dataclass
class FakeCore:
    config: EngineConfig
    inbox: Callable[[], Iterable[Inbound]]
    emit: Callable[[Outbound], None]
    clock: Callable[[], float]
    running: dict[str, Running] = field(default_factory=dict)
    seen: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    firsts: list[LatencySample] = field(default_factory=list)
    steps: int = 0
    told: int = -1
    """Requests that ran at the last `EngineStats`."""

    def __post_init__(self) -> None:
        if self.config.model == "broken":
            raise ValueError("there is no model called broken")
        gate = os.environ.get("FAKE_START_GATE")
        while gate and not Path(gate).exists():
            time.sleep(0.005)
        self.gate = Path(os.environ.get("FAKE_GATE", "/nowhere"))
        self.tokens_per_step = int(os.environ.get("FAKE_TOKENS_PER_STEP", "1"))
        self.scripts = os.environ.get("FAKE_SCRIPTS")
        self.pause = float(os.environ.get("FAKE_PAUSE", "0"))
        self.emit(
            EngineReady(
                max_model_len=self.config.max_model_len or 512,
                kv_tokens=4096,
                kv_bytes_per_token=64,
                layers=2,
                vocab_size=VOCAB,
                device="fake",
                dtype="float32",
                policy=self.config.policy,
            )
        )

    def step(self) -> float | None:
        for message in self.inbox():
            if isinstance(message, AbortRequest):
                self.running.pop(message.id, None)
            else:
                self.admit(message)
        for running in list(self.running.values()):
            self.advance(running)
        busy = any(r.request.sampling.seed != SILENT_SEED for r in self.running.values())
        self.steps += 1
        if self.told != len(self.running) or self.steps % 100 == 0:
            self.told = len(self.running)
            self.emit(self.stats())
        return self.pause if busy else None

    def admit(self, request: AddRequest) -> None:
        seed = request.sampling.seed
        if seed == REJECT_SEED:
            self.emit(Rejected(id=request.id, reason="the queue is full", retry_after=1.5))
            return
        if seed == REJECT_FOR_GOOD_SEED:
            self.emit(Rejected(id=request.id, reason="never", retry_after=None))
            return
        prompt = tuple(request.prompt)
        cached = len(prompt) - 1 if (request.cache_scope, prompt) in self.seen else 0
        self.prompt_tokens += len(prompt)
        self.emit(Accepted(request.id, cached))
        script = self.script(request)
        self.running[request.id] = Running(request, script, cached, request.generated)

    def script(self, request: AddRequest) -> list[int]:
        if self.scripts:
            prompt = bytes(request.prompt).decode(errors="replace")
            scripts: dict[str, list[str]] = json.loads(Path(self.scripts).read_text())
            for text, answers in scripts.items():
                if turns := prompt.partition(text)[2].count(TURN):
                    return [*answers[min(turns, len(answers)) - 1].encode(), EOS]
        grammar = request.sampling.grammar
        if grammar is not None and not grammar.optional:
            return [*json.dumps({"grammar": grammar.kind}).encode(), EOS]
        prompt = request.prompt[: len(request.prompt) - request.generated]
        if request.sampling.ignore_eos:
            return prompt
        return [*prompt, EOS]

    def advance(self, running: Running) -> None:
        request, sampling = running.request, running.request.sampling
        if sampling.seed == SILENT_SEED:
            return
        if sampling.seed == GATED_SEED and running.made and not self.gate.exists():
            time.sleep(0.005)
            return
        if sampling.seed == CRASH_SEED and running.made:
            raise RuntimeError("the core was told to crash")
        if sampling.seed == ERROR_SEED and running.made:
            del self.running[request.id]
            self.emit(Output(id=request.id, tokens=[], finish_reason="error", error="told to fail"))
            return
        if not sampling.max_tokens:
            del self.running[request.id]
            scores = self.prompt_scores(request)
            self.emit(
                Output(
                    id=request.id,
                    tokens=[],
                    finish_reason="length",
                    prompt_logprobs=scores,
                    embedding=self.embedding(request),
                )
            )
            return
        count = min(self.tokens_per_step, sampling.max_tokens - running.made)
        if not sampling.ignore_eos:
            count = min(count, len(running.script) - running.made)
        script, size = running.script, len(running.script)
        tokens = [script[(running.made + i) % size] for i in range(count)]
        first = running.made == request.generated
        running.made += count
        self.generation_tokens += count
        self.emit(self.output(running, tokens, first))

    def output(self, running: Running, tokens: list[int], first: bool) -> Output:
        request, sampling = running.request, running.request.sampling
        stops = {EOS} if not sampling.ignore_eos else set()
        stopped = tokens[-1] in stops | set(sampling.stop_token_ids)
        finish = "stop" if stopped else "length" if running.made == sampling.max_tokens else None
        if finish:
            del self.running[request.id]
        if first:
            self.seen.add((request.cache_scope, tuple(request.prompt)))
            waited = self.clock() - request.arrival
            self.firsts.append(LatencySample(len(request.prompt) < 256, waited / 2, waited))
        return Output(
            id=request.id,
            tokens=tokens,
            logprobs=None
            if sampling.logprobs is None
            else [self.logprob(t, sampling.logprobs) for t in tokens],
            prompt_logprobs=self.prompt_scores(request) if first else None,
            finish_reason=finish,
            stop_token=tokens[-1] if stopped else None,
            cached_tokens=running.cached if first else None,
            queued=0.0 if first else None,
        )

    @staticmethod
    def embedding(request: AddRequest) -> bytes | None:
        """How often each of four tokens is in the prompt, from ``a`` on, by the kind of pooling."""
        kind = request.sampling.embedding
        if kind is None:
            return None
        chosen = {"last": request.prompt[-1:], "mean": request.prompt, "cls": request.prompt[:1]}
        counts = [chosen[kind].count(ord("a") + place) for place in range(4)]
        return np.array(counts, "<f4").tobytes()

    @staticmethod
    def prompt_scores(request: AddRequest) -> PromptLogprobs | None:
        """The i-th token from the second on has -i and rank 2; likelier are the ids after it."""
        top = request.sampling.prompt_logprobs
        if top is None or request.generated:
            return None
        tokens = np.array(request.prompt[1:], "<i4")
        ids = (tokens[:, None] + 1 + np.arange(top, dtype="<i4")) % VOCAB
        return PromptLogprobs(
            top=top,
            logprobs=(-1 - np.arange(len(tokens), dtype="<f4")).tobytes(),
            ranks=np.full(len(tokens), 2, "<i4").tobytes(),
            top_ids=ids.astype("<i4").tobytes(),
            top_logprobs=np.full(ids.shape, -0.5, "<f4").tobytes(),
        )

    @staticmethod
    def logprob(token: int, top: int) -> TokenLogprob:
        return TokenLogprob(-0.5, 1, [((token + i) % VOCAB, -0.5 - i) for i in range(top)])

    def stats(self) -> EngineStats:
        firsts, self.firsts = self.firsts, []
        return EngineStats(
            load=EngineLoad(
                running=len(self.running),
                kv_usage=min(1.0, len(self.running) / 100),
                boundary_tokens=256,
                cost=CostProfile(per_token=1e-3, per_launch=0.02),
            ),
            prefix_queries=self.prompt_tokens,
            prefix_hits=0,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            batches={"short": 1},
            express_batches=0,
            recompute_preemptions=0,
            cost_error=0.1,
            wait_error={"short": 0.2, "long": 0.1},
            wait_coverage={"short": 0.9, "long": 0.9},
            firsts=firsts,
        )
