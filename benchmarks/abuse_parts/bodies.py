"""Hostile bodies, grown from a random generator: the same seed gives the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from abuse_parts.grammars import hostile_grammars

Body = tuple[str, bytes]
"""Path and body."""
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_BYTES = 8 * 2**20
NUMBERS = (
    *("0", "-0", "-1", "1", "1e-320", "1e308", "1e309", "-1e400", "NaN", "Infinity", "0.1"),
    *("2147483648", "-2147483648", "9223372036854775808", "1" * 400, "1" * 5000, "1e", "0x1"),
)
ALPHABETS = ("a", " ", "\n", "é", "字", "😀", "\\u0000", "\\ud800", "\\n", '\\"', "[{,", "%s{{x}}")
FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of", "temperature"),
    *("top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "stop"),
    *("repetition_penalty", "logit_bias", "stop_token_ids", "stream", "stream_options", "echo"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    *("priority", "ttft_slo_ms", "logprobs", "top_logprobs", "tools", "tool_choice", "metadata"),
    *("chat_template_kwargs", "messages", "prompt", "cache_salt", "user", "ignore_eos", "unknown"),
)


def hostile_bodies(rng: Random) -> Iterator[Body]:
    """Without end; all ways come equally often."""
    grammars = hostile_grammars(rng)
    while True:
        way = rng.choice(WAYS)
        path, body = constrained(rng, *next(grammars)) if way is None else way(rng)
        yield path, body[:MOST_BYTES]


def hostile_fields(rng: Random) -> Iterator[Body]:
    """Without end; bodies with odd fields, damaged ones and nested ones."""
    while True:
        path, body = rng.choice((odd_fields, odd_fields, damaged, nested))(rng)
        yield path, body[:MOST_BYTES]


def size(rng: Random, most: int) -> int:
    """From 1 to ``most``, small and large ones alike."""
    return max(1, round(most ** rng.random()))


def text(rng: Random, most: int = 4_000_000) -> str:
    """A JSON string, with its quotes; maybe one that is none."""
    letter = rng.choice(ALPHABETS)
    return '"' + letter * size(rng, most // len(letter)) + '"'


def value(rng: Random, depth: int = 3) -> str:
    """Any JSON text, mostly valid."""
    kind = rng.randrange(8 if depth else 4)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(("true", "false", "null", '""', text(rng, 2000)))
    if kind == 4:
        return "[" + ",".join(value(rng, depth - 1) for _ in range(size(rng, 30))) + "]"
    if kind == 5:
        return "{" + ",".join(f'"k{n}":{value(rng, depth - 1)}' for n in range(size(rng, 30))) + "}"
    repeated = value(rng, 0)
    return "[" + ",".join([repeated] * size(rng, 500_000 // len(repeated) + 1)) + "]"


def plain(rng: Random) -> dict[str, Any]:
    """A request that is served."""
    return {"prompt": "x" * size(rng, 300), "max_tokens": size(rng, 16)}


def completion(**fields: str) -> Body:
    """A completion with fields given as JSON texts."""
    found = {"prompt": '"a"', "max_tokens": "2", **fields}
    return COMPLETIONS, ("{" + ",".join(f'"{k}":{v}' for k, v in found.items()) + "}").encode(
        errors="surrogatepass"
    )


def odd_fields(rng: Random) -> Body:
    """Any values in any fields, also twice."""
    fields = [f'"{rng.choice(FIELDS)}":{value(rng)}' for _ in range(rng.randint(1, 6))]
    chat = rng.random() < 0.5
    base = '"messages":[{"role":"user","content":"a"}]' if chat else '"prompt":"a"'
    body = "{" + ",".join([base, '"max_tokens":2', *fields]) + "}"
    return (CHAT if chat else COMPLETIONS), body.encode(errors="surrogatepass")


def damaged(rng: Random) -> Body:
    """A good body with bytes changed, cut or doubled."""
    body = bytearray(json.dumps(plain(rng)).encode())
    for _ in range(size(rng, 20)):
        place = rng.randrange(len(body))
        body[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        body = body or bytearray(b"{")
    return COMPLETIONS, bytes(body)


def nested(rng: Random) -> Body:
    """Lists and objects inside one another, in any field or in the arguments of a tool call."""
    depth = size(rng, 200_000)
    opened = rng.choice(("[", '{"a":', '[{"a":'))
    closed = rng.choice(("", "]" * depth, "}" * depth, "}]" * depth))
    deep = opened * depth + closed
    if rng.random() < 0.5:
        return completion(**{rng.choice(FIELDS): deep})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": deep}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    return CHAT, json.dumps({"messages": messages, "max_tokens": 2}).encode()


def long_text(rng: Random) -> Body:
    return completion(prompt=text(rng, MOST_BYTES))


def many_tokens(rng: Random) -> Body:
    token = rng.choice(("5", "70000", "-1", "1.5", "null", "99999999999"))
    inner = "[" + ",".join([token] * size(rng, 2_000_000)) + "]"
    prompts = rng.choice((1, 1, size(rng, 300)))
    return completion(prompt=inner if prompts == 1 else "[" + ",".join([inner] * prompts) + "]")


def many_prompts(rng: Random) -> Body:
    fields = {"prompt": json.dumps(["a" * size(rng, 50)] * size(rng, 400))}
    fields["n"] = rng.choice(("1", "2", str(size(rng, 300))))
    fields["stream"] = rng.choice(("true", "false"))
    return completion(**fields)


def many_messages(rng: Random) -> Body:
    good = {"role": rng.choice(("user", "system", "tool")), "content": "a" * size(rng, 40)}
    message = rng.choice((good, good, {}, {"role": "user", "content": [{"type": "text"}] * 9}))
    messages = json.dumps([message] * size(rng, 100_000))
    return CHAT, f'{{"messages":{messages},"max_tokens":2}}'.encode()


def many_choices(rng: Random) -> Body:
    choices = ["a" * size(rng, 2000)] * size(rng, 3000)
    prompts = ["a"] * size(rng, 256)
    return completion(guided_choice=json.dumps(choices), prompt=json.dumps(prompts))


def many_entries(rng: Random) -> Body:
    """Large objects where small ones are meant."""
    count = size(rng, 100_000)
    entries = {rng.choice(("", "k")) + str(n): rng.choice((1, "x")) for n in range(count)}
    field = rng.choice(("logit_bias", "metadata", "chat_template_kwargs", "stream_options"))
    if rng.random() < 0.3:
        return completion(**{f"f{n}": "1" for n in range(count)})
    return completion(**{field: json.dumps(entries)})


def greedy(rng: Random) -> Body:
    """As much of the engine as may be asked for, within the rules."""
    fields = {
        "max_tokens": str(size(rng, 500)),
        "ignore_eos": "true",
        "n": str(size(rng, 32)),
        "priority": rng.choice(("0", "-2147483648")),
        "logprobs": rng.choice(("0", "20")),
        "stream": rng.choice(("true", "false")),
        "prompt": json.dumps(rng.choice(("a ", "word ")) * size(rng, 2000)),
    }
    return completion(**fields)


def constrained(rng: Random, kind: str, grammar: str) -> Body:
    field = {"json_schema": "guided_json", "regex": "guided_regex", "lark": "guided_grammar"}[kind]
    return completion(**{field: json.dumps(grammar), "n": str(size(rng, 8))})


WAYS: tuple[Callable[[Random], Body] | None, ...] = (
    *(odd_fields, odd_fields, damaged, nested, long_text, many_tokens, many_prompts),
    *(many_messages, many_choices, many_entries, greedy),
    None,
)
"""None stands for the next hostile grammar."""
