"""Every number, text and list that an engine or an instance sends has a bound where it is read."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from pla_serve.wire.codec import WireError, encode, engine_answers
from pla_serve.wire.engine import (
    EngineLoad,
    EngineReady,
    EngineStats,
    LatencySample,
    Output,
    PromptLogprobs,
    TokenLogprob,
    TransferStats,
)
from pla_serve.wire.link import FromInstance
from pla_serve.wire.requests import AddRequest

STATS: dict[str, Any] = {
    "load": EngineLoad(),
    "prefix_queries": 0,
    "prefix_hits": 0,
    "prompt_tokens": 0,
    "generation_tokens": 0,
    "batches": {"mixed": 1},
    "express_batches": 0,
    "recompute_preemptions": 0,
    "cost_error": 0.0,
    "wait_error": {"short": 0.0},
    "wait_coverage": {"short": 0.9},
    "firsts": [LatencySample(True, 0.1, 0.2)],
}
TRANSFER = dict.fromkeys(TransferStats.__struct_fields__, 0)
READY: dict[str, Any] = {
    "max_model_len": 1,
    "kv_tokens": 1,
    "kv_bytes_per_token": 1,
    "layers": 1,
    "vocab_size": 1,
    "device": "cpu",
    "dtype": "float32",
    "policy": "fcfs",
}
NUMBERS = [-1, 2**63, math.nan]
BAD: list[Any] = [
    *(EngineStats(**{**STATS, name: -1}) for name, value in STATS.items() if value == 0),
    *(EngineStats(**{**STATS, "cost_error": value}) for value in (math.nan, -1.0, math.inf)),
    *(EngineStats(**{**STATS, "wait_error": {"short": value}}) for value in (math.nan, -1.0)),
    *(EngineStats(**{**STATS, "firsts": [LatencySample(True, v, 0.0)]}) for v in (math.nan, 1e300)),
    *(EngineStats(**{**STATS, "firsts": [LatencySample(True, 0.0, v)]}) for v in (math.nan, 1e300)),
    EngineStats(**{**STATS, "batches": {"mixed": -1}}),
    EngineStats(**{**STATS, "batches": {"x" * 2000: 1}}),
    EngineStats(**{**STATS, "batches": {str(n): 1 for n in range(5000)}}),
    EngineStats(**{**STATS, "firsts": [LatencySample(True, 0.0, 0.0)] * 70_000}),
    *(
        EngineStats(**{**STATS, "transfer": TransferStats(**{**TRANSFER, name: value})})
        for name in TRANSFER
        for value in (-1, math.nan)
    ),
    *(EngineReady(**{**READY, name: -1}) for name, value in READY.items() if value == 1),
    *(EngineReady(**{**READY, name: "x" * 2000}) for name in ("device", "dtype", "policy")),
    *(Output(id="a", tokens=[1], logprobs=[TokenLogprob(v, 1, [])]) for v in (math.nan, math.inf)),
    Output(id="a", tokens=[1], logprobs=[TokenLogprob(-1.0, -1, [])]),
    Output(id="a", tokens=[1], logprobs=[TokenLogprob(-1.0, 1, [(1, math.nan)])]),
    Output(id="a", tokens=[1], logprobs=[TokenLogprob(-1.0, 1, [(-1, -1.0)])]),
    Output(id="a", tokens=[1], logprobs=[TokenLogprob(-1.0, 1, [(1, -1.0)] * 2000)]),
    Output(id="a", tokens=[-1]),
    Output(id="a", tokens=[2**40]),
    Output(id="a", tokens=[], queued=math.nan),
    Output(id="a", tokens=[], cached_tokens=-1),
    Output(id="a", tokens=[], error="x" * (2**20 + 1)),
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: repr(message)[:60])
def test_what_is_out_of_range_is_no_message(message: Any) -> None:
    with pytest.raises(WireError):
        engine_answers()(encode(message))


GOOD = [
    EngineStats(**STATS, transfer=TransferStats(**TRANSFER)),
    EngineReady(**READY),
    Output(id="a", tokens=[1], logprobs=[TokenLogprob(-math.inf, 1, [(1, 1e-7)])]),
]


@pytest.mark.parametrize("message", GOOD, ids=lambda message: type(message).__name__)
def test_what_is_in_range_is_read(message: Any) -> None:
    assert engine_answers()(encode(message)) == message


def test_scores_of_a_prompt_are_bounded() -> None:
    scores = PromptLogprobs(
        top=0, logprobs=bytes(4 * 400_000), ranks=bytes(4 * 400_000), top_ids=b"", top_logprobs=b""
    )
    with pytest.raises(WireError, match="length"):
        engine_answers()(encode(Output(id="a", tokens=[1], prompt_logprobs=scores)))


def unbounded(kind: Any, path: str) -> list[str]:
    """Fields of a type, and of those within it, that have no bound."""
    info = kind if isinstance(kind, msgspec.inspect.Type) else msgspec.inspect.type_info(kind)
    inspect = msgspec.inspect
    if isinstance(info, inspect.Metadata):
        return unbounded(info.type, path)
    if isinstance(info, inspect.UnionType):
        return [found for each in info.types for found in unbounded(each, path)]
    if isinstance(info, inspect.StructType):
        return [
            found
            for each in info.fields
            for found in unbounded(each.type, f"{path}.{info.cls.__name__}.{each.name}")
        ]
    if isinstance(info, (inspect.ListType, inspect.DictType)):
        inner = [info.item_type] if isinstance(info, inspect.ListType) else [info.value_type]
        here = [] if info.max_length is not None else [path]
        return [*here, *(found for each in inner for found in unbounded(each, path + "[]"))]
    if isinstance(info, (inspect.StrType, inspect.BytesType)):
        return [] if info.max_length is not None else [path]
    if isinstance(info, inspect.IntType):
        return [] if info.ge is not None and info.le is not None else [path]
    if isinstance(info, inspect.FloatType):
        return [] if info.le is not None else [path]
    return []


@pytest.mark.parametrize("kind", [FromInstance, AddRequest, EngineStats, EngineReady])
def test_no_field_is_without_a_bound(kind: Any) -> None:
    assert unbounded(kind, "") == []


class Loose(msgspec.Struct):
    text: str
    numbers: list[int]


def test_a_field_without_a_bound_is_found() -> None:
    assert unbounded(Loose, "") == [".Loose.text", ".Loose.numbers", ".Loose.numbers[]"]
