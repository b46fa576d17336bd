"""The link to a plain SGLang server, over its ``/generate`` with token ids in and out.

Written to SGLang's documentation and source; no SGLang engine was at hand to try it with.
``seed`` has an effect there only with ``--enable-deterministic-inference``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx
import msgspec

from pla_serve.fleet.link.dialect import Broken
from pla_serve.fleet.link.mapping import Unmappable, check_continuation, failure, rank_among
from pla_serve.fleet.link.protocol import InstanceFacts
from pla_serve.wire.engine import (
    AddRequest,
    EngineLoad,
    FinishReason,
    Grammar,
    Output,
    Rejected,
    SamplingParams,
    TokenLogprob,
)

LOWEST = float("-inf")
_Entry = tuple[float | None, int, str | None]


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str | None = None
    status_code: int | None = None


class _Meta(msgspec.Struct):
    completion_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: _Finish | None = None
    output_token_logprobs: list[_Entry] | None = None
    output_top_logprobs: list[list[_Entry] | None] | None = None


class _Error(msgspec.Struct):
    message: str = "no reason given"
    code: int | None = 400
    """SGLang sends no code with errors that are events; these are refusals of the request."""


class _Chunk(msgspec.Struct):
    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class SglangDialect:
    """See `Dialect`."""

    kind: str = "sglang"
    path = "/generate"

    def body(self, request: AddRequest, model: str) -> dict[str, Any]:
        """Return the body of a request.

        `VllmDialect.body` says how a request is continued that another instance has begun.
        """
        sampling = request.sampling
        if request.hand_over is not None:
            raise Unmappable("SGLang servers have no KV transfer with instances (hand_over)")
        if request.scores_prompt or not sampling.max_tokens:
            raise Unmappable(
                "prompts are not scored on SGLang servers (echo with logprobs, prompt_logprobs, "
                "embeddings, max_tokens 0)"
            )
        if request.priority:
            raise Unmappable("SGLang orders requests in its own way (priority)")
        check_continuation("SGLang", request)
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens - request.generated,
            "min_new_tokens": max(0, sampling.min_tokens - request.generated),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "ignore_eos": sampling.ignore_eos,
            "skip_special_tokens": False,
        }
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed
        if sampling.logit_bias:
            params["logit_bias"] = {str(id): bias for id, bias in sampling.logit_bias.items()}
        if sampling.grammar is not None:
            params |= _constraint(sampling.grammar)
        body: dict[str, Any] = {
            "input_ids": request.prompt,
            "sampling_params": params,
            "stream": True,
        }
        if request.cache_scope:
            body["extra_key"] = request.cache_scope
        if sampling.logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": sampling.logprobs}
        return body

    def answer(self, request: AddRequest) -> SglangAnswer:
        return SglangAnswer(request.id, request.sampling)

    async def facts(
        self, client: httpx.AsyncClient, model: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> InstanceFacts:
        info = await _server_info(client)
        return InstanceFacts(
            boot="",
            kind=self.kind,
            model=model["id"],
            max_model_len=model["max_model_len"],
            vocab_size=0,
            kv_tokens=_number(info, "max_total_num_tokens", 0),
            block_tokens=_number(info, "page_size", 1),
        )

    def load(self, metrics: Mapping[str, float]) -> EngineLoad:
        """Return the load; it is empty for servers without ``--enable-metrics``."""
        return EngineLoad(
            running=int(metrics.get("sglang:num_running_reqs", 0)),
            short_waiting=int(metrics.get("sglang:num_queue_reqs", 0)),
            kv_usage=metrics.get("sglang:token_usage", 0.0),
        )


class SglangAnswer:
    """An `Answer` of SGLang.

    Depending on the server's flags, each event repeats all token ids and log probabilities so far,
    or carries the new ones only. ``completion_tokens`` counts all so far in either case, so that
    the new ones can be told.
    """

    def __init__(self, id: str, sampling: SamplingParams) -> None:
        self._id = id
        self._logprobs = sampling.logprobs
        self._seen = 0

    def read(self, event: bytes) -> Output | Rejected | None:
        try:
            chunk = _decode(event)
        except msgspec.DecodeError as error:
            raise Broken(f"an event that is not one of SGLang's: {error}") from None
        if chunk.error is not None:
            return failure(self._id, chunk.error.message, chunk.error.code, self._seen > 0)
        meta = chunk.meta_info
        if meta is None or (chunk.output_ids is None and meta.finish_reason is None):
            raise Broken("an event without output_ids and meta_info")
        return self._output(chunk.output_ids or [], meta)

    def _output(self, ids: list[int], meta: _Meta) -> Output | Rejected | None:
        begun = self._seen > 0
        fresh = meta.completion_tokens - self._seen
        finish = meta.finish_reason
        self._seen = meta.completion_tokens
        tokens = ids[-fresh:] if fresh > 0 else []
        reason: FinishReason | None = None
        stop_token = None
        if finish is not None:
            if finish.type not in ("stop", "length"):
                why = finish.message or f"SGLang ended the request: {finish.type}"
                return failure(self._id, why, finish.status_code, begun)
            reason = "stop" if finish.type == "stop" else "length"
            if reason == "stop" and tokens:
                stop_token = tokens[-1]
        if not tokens and reason is None:
            return None
        return Output(
            id=self._id,
            tokens=tokens,
            logprobs=self._read_logprobs(meta, len(tokens)),
            finish_reason=reason,
            stop_token=stop_token,
            cached_tokens=meta.cached_tokens if not begun else None,
        )

    def _read_logprobs(self, meta: _Meta, fresh: int) -> list[TokenLogprob] | None:
        if self._logprobs is None or not fresh:
            return None
        chosen = (meta.output_token_logprobs or [])[-fresh:]
        tops = (meta.output_top_logprobs or [None] * len(chosen))[-fresh:]
        if len(chosen) != fresh or len(tops) != fresh:
            raise Broken(f"{len(chosen)} log probabilities for {fresh} tokens")
        return [
            rank_among(
                LOWEST if logprob is None else logprob,
                [(id, LOWEST if value is None else value) for value, id, _ in top or ()],
                self._logprobs,
            )
            for (logprob, _, _), top in zip(chosen, tops, strict=True)
        ]


async def _server_info(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return the server's description of itself, from the newer or the older path; {} for none."""
    for path in ("/server_info", "/get_server_info"):
        response = await client.get(path)
        if response.is_success:
            with suppress(ValueError, RecursionError):
                info = response.json()
                if isinstance(info, dict):
                    return info
    return {}


def _number(info: dict[str, Any], name: str, default: int) -> int:
    """Return a positive number that the server, or its first scheduler, says of itself."""
    states = info.get("internal_states")
    inner = states[0] if isinstance(states, list) and states else {}
    for place in (info, inner):
        value = place.get(name) if isinstance(place, dict) else None
        if isinstance(value, int) and value > 0:
            return value
    return default


def _constraint(grammar: Grammar) -> dict[str, Any]:
    if grammar.thought is not None:
        if grammar.optional:
            return {}
        raise Unmappable(
            "SGLang begins a grammar at the first token, not after reasoning (grammar)"
        )
    match grammar.kind:
        case "json_object":
            return {"json_schema": '{"type": "object"}'}
        case "json_schema":
            return {"json_schema": grammar.spec}
        case "regex":
            return {"regex": grammar.spec}
        case "lark":
            if grammar.optional:
                return {}
            raise Unmappable("SGLang takes EBNF, not Lark grammars (grammar)")
