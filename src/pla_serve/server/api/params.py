"""Maps the fields of a request to the engine's `SamplingParams`."""

from __future__ import annotations

import json
import re
from typing import Any

from pla_serve.server.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from pla_serve.server.api.schema_keywords import relaxed, unheld
from pla_serve.server.bounded_json import decode
from pla_serve.server.errors import invalid
from pla_serve.server.generation.defaults import SamplingDefaults
from pla_serve.wire.engine import Grammar, SamplingParams
from pla_serve.wire.limits import GREEDY_BELOW, MOST_PROMPT_LOGPROBS

MOST_HELD_LOGPROBS = 2_000_000
"""Log probabilities of one answer that is not streamed; each takes about 100 bytes meanwhile."""
MOST_ECHOED = 2**24
"""Characters of prompts in one answer, all choices together."""
MOST_CONSTRAINT = 2**17
"""Characters of a schema, a regular expression or a grammar; each sequence carries its own."""


def sampling_params(
    request: ChatRequest | CompletionRequest,
    max_tokens: int,
    vocab_size: int,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """Return how an engine is to sample. ``defaults`` stand in for fields that are not given.

    Raises:
        ApiError: a token id outside the vocabulary, or fields that contradict each other.
    """
    if request.min_tokens > max_tokens:
        raise invalid(
            f"min_tokens ({request.min_tokens}) exceeds max_tokens ({max_tokens})", "min_tokens"
        )
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    top_p = _first(request.top_p, defaults.top_p, 1.0)
    top_k = max(int(_first(request.top_k, defaults.top_k, 0)), 0)
    if top_p == 0:
        # The smallest set of tokens, as OpenAI has it: the likeliest one.
        top_p, top_k = 1.0, 1
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias, vocab_size),
        stop_token_ids=_stop_ids(request.stop_token_ids, vocab_size),
        ignore_eos=request.ignore_eos,
        logprobs=logprobs_wanted(request),
        prompt_logprobs=request.scores_prompt,
        grammar=grammar(request),
    )


def logprobs_wanted(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def check_held_logprobs(
    request: GenerationRequest, sampling: SamplingParams, most_tokens: int, prompts: list[int]
) -> None:
    """Check that an answer does not make the server hold too many log probabilities.

    A stream gives those of the output away as they come, so of these it may have any number.

    Args:
        most_tokens: output tokens of all choices together, at most.
        prompts: tokens of the prompt of each choice.

    Raises:
        ApiError: 400: it asks for more than `MOST_HELD_LOGPROBS` at once, or for more than
            `MOST_PROMPT_LOGPROBS` of one prompt.
    """
    held = 0
    if sampling.prompt_logprobs is not None:
        longest = max(prompts) * (1 + sampling.prompt_logprobs)
        if longest > MOST_PROMPT_LOGPROBS:
            raise invalid(
                f"one prompt would be given {longest} log probabilities, more than "
                f"{MOST_PROMPT_LOGPROBS}: shorten it, or lower logprobs or prompt_logprobs",
                "prompt_logprobs",
            )
        held = sum(prompts) * (1 + sampling.prompt_logprobs)
    if sampling.logprobs is not None and not request.stream:
        held += most_tokens * (1 + sampling.logprobs)
    if held > MOST_HELD_LOGPROBS:
        raise invalid(
            f"the answer may have {held} log probabilities, more than the {MOST_HELD_LOGPROBS} "
            "that are held for one answer: ask for fewer at once, or stream those of the output",
            "logprobs",
        )


def check_echoes(echoes: list[str], n: int) -> None:
    """Check that the prompts, which are repeated in every choice, do not add up to too much.

    Args:
        echoes: the texts that the choices of each prompt begin with.
        n: choices of each prompt.

    Raises:
        ApiError: 400, they are more than `MOST_ECHOED` characters.
    """
    echoed = n * sum(map(len, echoes))
    if echoed > MOST_ECHOED:
        raise invalid(
            f"the answer would repeat {echoed} characters of prompts, more than {MOST_ECHOED}: "
            "lower n, or send the prompts in several requests",
            "echo",
        )


def grammar(request: GenerationRequest) -> Grammar | None:
    """The one constraint that the request names, in whichever of the three ways."""
    found = [*_from_format(request), *_from_structured(request), *_from_guided(request)]
    if len(found) > 1:
        raise invalid("give only one of response_format, structured_outputs and guided_*")
    if found and len(found[0].spec) > MOST_CONSTRAINT:
        raise invalid(
            f"a constraint may have {MOST_CONSTRAINT} characters, not {len(found[0].spec)}",
            "response_format",
        )
    return found[0] if found else None


def _from_format(request: GenerationRequest) -> list[Grammar]:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.json_schema is None:
        return [Grammar("json_object")]
    return [_schema(wanted.json_schema.schema_, strict=bool(wanted.json_schema.strict))]


def _from_structured(request: GenerationRequest) -> list[Grammar]:
    wanted = request.structured_outputs
    if wanted is None:
        return []
    found = _constraints(wanted.json_, wanted.regex, wanted.choice, wanted.grammar)
    if wanted.json_object:
        found.append(Grammar("json_object"))
    if len(found) != 1:
        raise invalid("give exactly one constraint", "structured_outputs")
    return found


def _from_guided(request: GenerationRequest) -> list[Grammar]:
    return _constraints(
        request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar
    )


def _constraints(
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    lark: str | None,
) -> list[Grammar]:
    found = []
    if schema is not None:
        found.append(_schema(schema))
    if regex is not None:
        found.append(Grammar("regex", regex))
    if choice is not None:
        found.append(Grammar("regex", "|".join(f"({re.escape(item)})" for item in choice)))
    if lark is not None:
        found.append(Grammar("lark", lark))
    return found


def _schema(schema: dict[str, Any] | str, *, strict: bool = False) -> Grammar:
    """Return the grammar of a schema, without what is not held unless it is ``strict``."""
    if isinstance(schema, str):
        schema = decode(schema.encode(), "the JSON schema")
        if not isinstance(schema, dict):
            raise invalid("a JSON schema must be an object")
    return Grammar("json_schema", json.dumps(schema if strict else relaxed(schema)))


def unheld_keywords(request: ChatRequest | CompletionRequest) -> list[str]:
    """Return the keywords of the request's schemas that the answer is not held to, sorted.

    A schema that is strict has none: if something in it cannot be held, the request is refused.
    """
    wanted, other = request.response_format, request.structured_outputs
    schemas: list[Any] = [request.guided_json, other and other.json_]
    if wanted is not None and wanted.json_schema is not None and not wanted.json_schema.strict:
        schemas.append(wanted.json_schema.schema_)
    if isinstance(request, ChatRequest):
        functions = [tool.function for tool in request.tools]
        schemas += [each.parameters for each in functions if not each.strict]
    found: set[str] = set()
    for schema in schemas:
        found |= unheld(json.loads(schema) if isinstance(schema, str) else schema)
    return sorted(found)


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not bias:
        return None
    return {_bias_id(key, vocab_size): value for key, value in bias.items()}


def _bias_id(key: str, vocab_size: int) -> int:
    # isdecimal alone would let other scripts' digits through.
    if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab_size):
        raise invalid(
            f"the keys of logit_bias must be token ids below {vocab_size}, not {key[:50]!r}",
            "logit_bias",
        )
    return int(key)


def _stop_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    for token in ids or ():
        if token >= vocab_size:
            raise invalid(f"token ids must be below {vocab_size}, not {token}", "stop_token_ids")
    return tuple(ids or ())


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    """Return the first of these that is there."""
    if given is not None:
        return given
    return otherwise if default is None else default
