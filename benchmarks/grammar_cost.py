"""Measures what a grammar costs its own request: time to the first token, and between tokens.

Requests with a grammar and without take turns, so that both see the same machine. Each grammar is
new to the server, as the first request of a user is, or the same as before. Prompts differ, and
have as many tokens.

    python benchmarks/grammar_cost.py -o benchmarks/results/grammar_cost.json    # two minutes
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from abuse import INNOCENT, server
from abuse_parts.sockets import Address

from pla_serve.bench.save import write_json
from pla_serve.environment import describe

MOST_MORE = 0.005
"""Seconds that a grammar may add to the time to the first token."""
TOKENS = 24
WARM = 3
"""Pairs that are not counted."""


def schema(number: int) -> dict[str, Any]:
    """Return a schema of a usual size; another one for each number."""
    fields: dict[str, Any] = {
        f"field_{number}_{n}": {"type": "string", "maxLength": 40} for n in range(5)
    }
    fields["count"] = {"type": "integer"}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def constraint(kind: str, number: int) -> dict[str, Any]:
    """Return the fields of a request that constrain it, nothing for ``plain``."""
    if kind == "plain":
        return {}
    if kind == "regex":
        return {"guided_regex": rf"[a-z ]{{{200 + number},400}}"}
    return {"guided_json": json.dumps(schema(0 if kind == "same schema" else number))}


KINDS = ("plain", "same schema", "new schema", "regex")


def ask(client: httpx.Client, kind: str, number: int) -> list[float]:
    """Stream one answer; returns the seconds at which its tokens came."""
    body = {
        "prompt": f"Write about city {1000 + 4 * number + KINDS.index(kind)}, as JSON: ",
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        **constraint(kind, number),
    }
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{kind}: status {answer.status_code}: {answer.read()[:300]!r}")
        return [
            time.perf_counter() - began
            for line in answer.iter_lines()
            if line.startswith("data: ") and line != "data: [DONE]"
        ]


def measure(address: Address, pairs: int) -> dict[str, Any]:
    """Ask in turn, one request at a time. JSON-ready."""
    first: dict[str, list[float]] = {kind: [] for kind in KINDS}
    gaps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    headers = {"Authorization": f"Bearer {address.key}"}
    url = f"http://{address.host}:{address.port}"
    with httpx.Client(base_url=url, headers=headers, timeout=60.0, trust_env=False) as client:
        for number in range(WARM + pairs):
            for kind in KINDS:
                times = ask(client, kind, number)
                if number >= WARM:
                    first[kind].append(times[0])
                    gaps[kind].append((times[-1] - times[0]) / max(1, len(times) - 1))
    return {kind: one(first, gaps, kind) for kind in KINDS}


def one(
    first: dict[str, list[float]], gaps: dict[str, list[float]], kind: str
) -> dict[str, float | int]:
    """Return medians, and the medians of the differences to the plain request beside it."""

    def more(of: dict[str, list[float]]) -> float:
        return statistics.median(
            mine - plain for mine, plain in zip(of[kind], of["plain"], strict=True)
        )

    return {
        "requests": len(first[kind]),
        "ttft_p50": statistics.median(first[kind]),
        "tpot_p50": statistics.median(gaps[kind]),
        "ttft_more": more(first),
        "tpot_more": more(gaps),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model for pla-serve; SmolLM2 by default")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this program
    words = [] if options.model is None else [options.model]
    with server("serve", [*words, "--kv-cache-gib", "1"]) as (address, _):
        found = measure(Address(address.host, address.port, INNOCENT), options.pairs)
    content = {
        "kind": "cost of a grammar for its own request; seconds",
        "environment": describe(),
        "model": options.model or "SmolLM2-135M-Instruct",
        "kinds": found,
    }
    if options.output is not None:
        write_json(options.output, content)
    for kind, values in found.items():
        print(kind, {name: round(value, 5) for name, value in values.items()})
    late = [kind for kind, values in found.items() if values["ttft_more"] > MOST_MORE]
    print("\n".join(f"{kind}: more than {MOST_MORE} s" for kind in late) or "Everything held.")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
