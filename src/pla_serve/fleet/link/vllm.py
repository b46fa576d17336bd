"""The link to a plain vLLM server, over its ``/v1/completions`` with token ids in and out.

What carries over: prompts, limits, stop ids, sampling parameters, seeds, log probabilities,
grammars. What does not: deadlines (the router's alone), and an exact continuation of what another
instance began; see `body`. Tried with vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

from pla_serve.fleet.link.dialect import Broken
from pla_serve.fleet.link.mapping import (
    Unmappable,
    check_continuation,
    failure,
    packed_scores,
    rank_among,
)
from pla_serve.fleet.link.protocol import InstanceFacts
from pla_serve.grammar.thought import after_thought
from pla_serve.wire.engine import (
    AddRequest,
    EngineLoad,
    FinishReason,
    Grammar,
    Output,
    PromptLogprobs,
    Rejected,
    TokenLogprob,
)

BLOCK_TOKENS = 16
"""Default block size of vLLM, for servers that do not report theirs."""


LLGUIDANCE = "%llguidance"
"""Beginning of grammars that no other library than llguidance reads."""
PROBE_SECONDS = 10.0
"""How long a server may take for the token by which it shows that it reads them."""


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Error(msgspec.Struct):
    message: str = "no reason given"
    code: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class VllmDialect:
    """The `Dialect` of one vLLM server.

    A vLLM engine keeps to the library that its first constraint chose, and only one of them,
    llguidance, reads the grammars of tool calls. So the server is asked for such a grammar when the
    link opens. If that is its first constraint, it keeps to llguidance from then on.
    """

    kind: str = "vllm"
    path = "/v1/completions"

    def __init__(self) -> None:
        self._follows_grammars: bool | None = None
        """Whether the server reads grammars of llguidance; None if it has not said."""

    def body(self, request: AddRequest, model: str) -> dict[str, Any]:
        """Return the body of a request. Fields that are left out have the same default in vLLM.

        A request that another instance has begun is sent as a longer prompt with fewer tokens to
        generate. Greedy decoding then continues it exactly. Sampled tokens follow the same
        distribution, but are not the ones that the other instance would have drawn. Penalties of
        presence and frequency, and grammars, would start anew, so they are refused.
        """
        sampling = request.sampling
        if request.hand_over is not None:
            raise Unmappable("vLLM servers have no KV transfer with instances (hand_over)")
        check_continuation("vLLM", request)
        body: dict[str, Any] = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": max(1, sampling.max_tokens - request.generated),
            "min_tokens": max(0, sampling.min_tokens - request.generated),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "ignore_eos": sampling.ignore_eos,
            "stop_token_ids": list(sampling.stop_token_ids),
            "stream": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "priority": request.priority,
        }
        if request.cache_scope:
            body["cache_salt"] = request.cache_scope
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.logit_bias:
            body["logit_bias"] = {str(id): bias for id, bias in sampling.logit_bias.items()}
        logprobs = _most_logprobs(request)
        if logprobs is not None:
            body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
        if sampling.embedding is not None:
            raise Unmappable("vLLM servers of a language model make no embeddings")
        if request.scores_prompt:
            body["echo"] = True  # with logprobs: vLLM streams no prompt_logprobs
        if sampling.grammar is not None and self._follows(sampling.grammar):
            body["structured_outputs"] = _structured(sampling.grammar)
        return body

    def _follows(self, grammar: Grammar) -> bool:
        """Return whether the server is given the grammar; one that is optional may be left out.

        Raises:
            Unmappable: it has to follow the grammar and cannot.
        """
        if grammar.kind != "lark" or not grammar.spec.startswith(LLGUIDANCE):
            return True
        if grammar.optional:
            return self._follows_grammars is True
        if self._follows_grammars is False:
            raise Unmappable(
                "this vLLM server cannot hold answers to the grammar of tool calls; start it with "
                "--structured-outputs-config.backend guidance"
            )
        return True

    def answer(self, request: AddRequest) -> VllmAnswer:
        return VllmAnswer(request)

    async def facts(
        self, client: httpx.AsyncClient, model: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> InstanceFacts:
        self._follows_grammars = await _follows_grammars(client, model["id"])
        block = int(metrics.get("vllm:cache_config_info.block_size", BLOCK_TOKENS))
        blocks = int(metrics.get("vllm:cache_config_info.num_gpu_blocks", 0))
        return InstanceFacts(
            boot="",
            kind=self.kind,
            model=model["id"],
            max_model_len=model["max_model_len"],
            vocab_size=0,
            kv_tokens=block * blocks,
            block_tokens=block,
        )

    def load(self, metrics: Mapping[str, float]) -> EngineLoad:
        return EngineLoad(
            running=int(metrics.get("vllm:num_requests_running", 0)),
            short_waiting=int(metrics.get("vllm:num_requests_waiting", 0)),
            kv_usage=metrics.get("vllm:kv_cache_usage_perc", 0.0),
        )


class VllmAnswer:
    """See `Answer`."""

    def __init__(self, request: AddRequest) -> None:
        self._id = request.id
        self._sampling = request.sampling
        self._awaits_scores = request.scores_prompt
        self._begun = False

    def read(self, event: bytes) -> Output | Rejected | None:
        try:
            chunk = _decode(event)
            if chunk.error is not None:
                return failure(self._id, chunk.error.message, chunk.error.code, self._begun)
            if not chunk.choices:
                return None
            return self._output(chunk.choices[0])
        except (msgspec.DecodeError, ValueError) as error:
            raise Broken(f"an event that is not one of vLLM's: {error}") from None

    def _output(self, choice: _Choice) -> Output | None:
        tokens = choice.token_ids
        if tokens is None:
            raise Broken("no token ids (return_token_ids); vLLM 0.10.2 or newer is needed")
        if not tokens and choice.finish_reason is None:
            return None
        if choice.finish_reason not in (None, "stop", "length"):
            error = f"vLLM ended the request: {choice.finish_reason}"
            return Output(id=self._id, tokens=tokens, finish_reason="error", error=error)
        self._begun = True
        reason: FinishReason | None = None
        if choice.finish_reason is not None:
            reason = "stop" if choice.finish_reason == "stop" else "length"
        scores = None
        if self._awaits_scores:
            self._awaits_scores = False
            scores = self._read_scores(choice.logprobs, len(tokens))
        if not self._sampling.max_tokens:
            # vLLM makes at least one token, which nobody has asked for.
            return Output(id=self._id, tokens=[], prompt_logprobs=scores, finish_reason="length")
        wanted, logprobs = self._sampling.logprobs, None
        if wanted is not None and choice.logprobs is not None:
            first = len(choice.logprobs.tokens) - len(tokens)
            logprobs = _read_logprobs(choice.logprobs, first, wanted)
        return Output(
            id=self._id,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=scores,
            finish_reason=reason,
            stop_token=tokens[-1] if reason == "stop" and tokens else None,
        )

    def _read_scores(self, logprobs: _Logprobs | None, made: int) -> PromptLogprobs:
        """Return the scores of the prompt, which stand before those of ``made`` tokens."""
        wanted = self._sampling.prompt_logprobs or 0
        if logprobs is None:
            raise Broken("no log probabilities of an echoed prompt")
        found = _read_logprobs(logprobs, 1, wanted)
        return packed_scores(found[: len(found) - made], wanted)


def _most_logprobs(request: AddRequest) -> int | None:
    """Return the likeliest tokens that are wanted in any place, of output or prompt."""
    sampling = request.sampling
    wanted = [sampling.logprobs, sampling.prompt_logprobs if request.scores_prompt else None]
    return max((each for each in wanted if each is not None), default=None)


def _read_logprobs(logprobs: _Logprobs, first: int, most: int) -> list[TokenLogprob]:
    """Return the log probabilities from place ``first`` on, each with the ``most`` likeliest."""
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    return [
        rank_among(
            float("-inf") if logprob is None else logprob,
            [(_token(name), value) for name, value in (top or {}).items()],
            most,
        )
        for logprob, top in zip(logprobs.token_logprobs[first:], tops[first:], strict=True)
    ]


async def _follows_grammars(client: httpx.AsyncClient, model: str) -> bool | None:
    """Ask for one token under a grammar of llguidance; None if no answer comes, or not in time."""
    probe = {
        "model": model,
        "prompt": [0],
        "max_tokens": 1,
        "structured_outputs": {"grammar": f"{LLGUIDANCE} {{}}\nstart: /(.|\\n)*/\n"},
    }
    try:
        answer = await client.post("/v1/completions", json=probe, timeout=PROBE_SECONDS)
    except httpx.HTTPError:
        return None
    return answer.is_success


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _structured(grammar: Grammar) -> dict[str, Any]:
    if grammar.thought is not None:
        return {"grammar": after_thought(grammar)}
    match grammar.kind:
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            return {"json": grammar.spec}
        case "regex":
            return {"regex": grammar.spec}
        case "lark":
            return {"grammar": grammar.spec}
