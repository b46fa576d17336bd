"""Links to vLLM and SGLang servers: their words for our requests, their ends and ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest

from pla_serve.fleet.link.dialect import Dialect
from pla_serve.fleet.link.http import HttpLink, HttpLinkTimes
from pla_serve.fleet.link.mapping import Unmappable, failure, refusal, samples
from pla_serve.fleet.link.protocol import LinkDown, LinkRefused
from pla_serve.fleet.link.sglang import SglangDialect
from pla_serve.fleet.link.vllm import VllmDialect
from pla_serve.wire.engine import (
    AbortRequest,
    AddRequest,
    Begin,
    Grammar,
    HandOver,
    Lend,
    Output,
    Rejected,
    Release,
    Reserve,
    SamplingParams,
)
from tests.fleet.link.fake_http import FakeServer, serving, sglang_events, vllm_events
from tests.fleet.link.link_harness import FAST, Recorder, add, running

DIALECTS: dict[str, tuple[Dialect, Any]] = {
    "vllm": (VllmDialect(), vllm_events),
    "sglang": (SglangDialect(), sglang_events),
    "sglang incremental": (SglangDialect(), partial(sglang_events, incremental=True)),
}
BOTH = pytest.mark.parametrize("kind", ["vllm", "sglang"])
ALL = pytest.mark.parametrize("kind", DIALECTS)
PROMPT = [10, 11, 12, 13, 14]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


@asynccontextmanager
async def linked(kind: str, **options: Any) -> AsyncIterator[tuple[HttpLink, Recorder, FakeServer]]:
    dialect, events = DIALECTS[kind]
    recorder = Recorder()
    waits = {"liveness": 1.0, "poll": 0.02, "backoff": FAST}
    waits |= {name: options.pop(name) for name in ("liveness", "stall") if name in options}
    fake = {name: options.pop(name) for name in list(options) if name in ("info", "metrics")}
    async with serving(FakeServer(events, **fake)) as server:
        link = HttpLink(server.url, recorder, dialect, times=HttpLinkTimes(**waits), **options)
        async with running(link):
            await recorder.until(lambda: recorder.boots and recorder.reports)
            yield link, recorder, server


async def ask(link: HttpLink, events: Recorder, request: AddRequest) -> None:
    link.send(request)
    await events.until(lambda: events.finish(request.id) or events.rejected(request.id))


@ALL
def test_an_answer_ends_with_its_stop_token(kind: str) -> None:
    async def main() -> None:
        async with linked(kind) as (link, events, _):
            await ask(link, events, add("a", PROMPT))
            assert events.accepted("a")
            assert events.tokens("a") == [*PROMPT, 2]
            last = events.outputs("a")[-1]
            assert (last.finish_reason, last.stop_token) == ("stop", 2)
            await ask(link, events, add("b", PROMPT, sampling={"max_tokens": 3}))
            assert events.tokens("b") == PROMPT[:3]
            assert events.outputs("b")[-1].finish_reason == "length"
            assert events.outputs("b")[-1].stop_token is None
            await ask(link, events, add("c", PROMPT, sampling={"stop_token_ids": (12,)}))
            assert events.tokens("c") == [10, 11, 12]
            assert events.outputs("c")[-1].stop_token == 12

    run(main())


@ALL
@pytest.mark.parametrize("top", [0, 2])
def test_log_probabilities_are_one_a_token(kind: str, top: int) -> None:
    async def main() -> None:
        async with linked(kind) as (link, events, _):
            await ask(link, events, add("a", PROMPT, sampling={"logprobs": top}))
            pairs = [
                (token, logprob)
                for output in events.outputs("a")
                for token, logprob in zip(output.tokens, output.logprobs or [], strict=True)
            ]
            assert [token for token, _ in pairs] == [*PROMPT, 2]
            for token, logprob in pairs:
                assert logprob.logprob == -0.5
                assert logprob.top == ([(token + 1, -0.25), (token, -0.5)] if top else [])
                assert logprob.rank == (2 if top else 1)

    run(main())


@BOTH
def test_what_another_began_is_a_longer_prompt_with_less_to_make(kind: str) -> None:
    async def main() -> None:
        async with linked(kind) as (link, events, server):
            sampling = {"max_tokens": 8, "min_tokens": 5}
            await ask(link, events, add("a", PROMPT, generated=2, sampling=sampling))
            body = server.bodies[-1]
            params = body.get("sampling_params", body)
            made = params.get("max_tokens", params.get("max_new_tokens"))
            least = params.get("min_tokens", params.get("min_new_tokens"))
            assert (made, least) == (6, 3)

    run(main())


def test_cache_scopes_have_their_place_at_each_server() -> None:
    for kind, field in (("vllm", "cache_salt"), ("sglang", "extra_key")):
        dialect, _ = DIALECTS[kind]
        assert dialect.body(add("a", cache_scope="of a tenant"), "m")[field] == "of a tenant"
        assert field not in dialect.body(add("a"), "m")


@BOTH
def test_what_cannot_be_said_is_refused_by_name(kind: str) -> None:
    dialect, _ = DIALECTS[kind]
    lark = Grammar("lark", 'start: "x"')
    cases = {
        "hand_over": add("a", hand_over=HandOver(lease_seconds=1.0)),
        "presence_penalty": add("a", generated=1, sampling={"presence_penalty": 1.0}),
        "grammar": add("a", generated=1, sampling={"grammar": lark}),
    }
    if kind == "sglang":
        cases["priority"] = add("a", priority=1)
        cases["Lark"] = add("a", sampling={"grammar": lark})
    for name, request in cases.items():
        with pytest.raises(Unmappable, match=name):
            dialect.body(request, "m")

    async def main() -> None:
        async with linked(kind) as (link, events, server):
            await ask(link, events, cases["hand_over"])
            refused = events.rejected("a")
            assert refused is not None
            assert "hand_over" in refused.reason
            assert refused.retry_after is None
            assert not server.bodies
            for index, message in enumerate(
                [
                    Reserve(request=add("r0"), source=b"", lease_seconds=1.0),
                    Begin(id="r1", tokens=[]),
                    Lend(id="r2", tokens=[1], lease_seconds=1.0),
                ]
            ):
                link.send(message)
                name = f"r{index}"
                refused = await events.until(lambda name=name: events.rejected(name))
                assert "no KV transfer" in refused.reason
            link.send(Release("r2"))

    run(main())


def test_every_parameter_has_its_place_at_vllm() -> None:
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=1,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        logit_bias={5: -1.5},
        stop_token_ids=(4,),
        ignore_eos=True,
        logprobs=2,
        grammar=Grammar("regex", "a+"),
    )
    request = AddRequest(id="a", prompt=[1, 2], sampling=sampling, arrival=0.0, priority=2)
    assert VllmDialect().body(request, "m") == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 9,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -3,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.3,
        "logit_bias": {"5": -1.5},
        "stop_token_ids": [4],
        "ignore_eos": True,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "structured_outputs": {"regex": "a+"},
        "stream": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "priority": 2,
    }
    grammars = {
        "json_object": {"json_object": True},
        "json_schema": {"json": "s"},
        "lark": {"grammar": "s"},
    }
    for kind, said in grammars.items():
        body = VllmDialect().body(add("a", sampling={"grammar": Grammar(kind, "s")}), "m")  # type: ignore[arg-type]
        assert body["structured_outputs"] == said
    params = SglangDialect().body(add("a", sampling={"grammar": Grammar("json_object")}), "m")
    assert params["sampling_params"]["json_schema"] == '{"type": "object"}'
    may_be_left_out = {"grammar": Grammar("lark", "s", optional=True)}
    with_it = SglangDialect().body(add("a", sampling=may_be_left_out), "m")
    assert with_it == SglangDialect().body(add("a"), "m")
    assert VllmDialect().body(add("a", sampling=may_be_left_out), "m")["structured_outputs"]


@pytest.mark.parametrize(
    ("kind", "sampling", "reason"),
    [
        ("vllm", {"grammar": Grammar("json_schema", "{")}, "bad schema"),
        ("sglang", {"grammar": Grammar("regex", "(")}, "bad regex"),
    ],
)
def test_a_fault_told_in_the_stream_is_a_refusal(
    kind: str, sampling: dict[str, Any], reason: str
) -> None:
    async def main() -> None:
        async with linked(kind) as (link, events, _):
            await ask(link, events, add("a", sampling=sampling))
            refused = events.rejected("a")
            assert refused is not None
            assert (refused.reason, refused.retry_after) == (reason, None)
            assert not events.accepted("a")

    run(main())


@pytest.mark.parametrize(
    ("status", "later"),
    [(400, None), (413, None), (422, None), (501, None), (429, 7.0), (503, 7.0)],
)
def test_statuses_say_whether_to_try_again(status: int, later: float | None) -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            server.status = status
            await ask(link, events, add("a"))
            refused = events.rejected("a")
            assert refused is not None
            assert refused.reason == f"no such thing (HTTP {status})"
            assert refused.retry_after == later
            assert link.connected

    run(main())


@pytest.mark.parametrize("status", [302, 401, 403, 404, 408, 500, 502, 504])
def test_other_statuses_are_failures_of_the_server(status: int) -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            server.status = status
            await ask(link, events, add("a"))
            [output] = events.outputs("a")
            assert (output.finish_reason, output.tokens) == ("error", [])
            assert output.error == f"no such thing (HTTP {status})"
            assert events.rejected("a") is None
            assert link.connected

    run(main())


@pytest.mark.parametrize(
    ("headers", "later"),
    [
        ({}, None),
        ({"Retry-After": "2.5"}, 2.5),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1.0),
        ({"Retry-After": "nan"}, 1.0),
        ({"Retry-After": "inf"}, 1.0),
        ({"Retry-After": "-3"}, 1.0),
    ],
)
def test_503_is_room_if_it_says_when_to_come_back(
    headers: dict[str, str], later: float | None
) -> None:
    answer = refusal("a", httpx.Response(503, headers=headers), b"busy")
    if later is None:
        assert isinstance(answer, Output)
        assert (answer.finish_reason, answer.error) == ("error", "busy (HTTP 503)")
    else:
        assert answer == Rejected(id="a", reason="busy (HTTP 503)", retry_after=later)


@pytest.mark.parametrize(
    ("code", "begun", "later"),
    [
        (400, False, None),
        (422, False, None),
        (429, False, 1.0),
        (503, False, 1.0),
        (500, False, "failure"),
        (404, False, "failure"),
        (None, False, "failure"),
        (400, True, "failure"),
        (503, True, "failure"),
    ],
)
def test_errors_in_a_stream(code: int | None, begun: bool, later: float | str | None) -> None:
    answer = failure("a", "why", code, begun)
    if later == "failure":
        assert isinstance(answer, Output)
        assert (answer.finish_reason, answer.error) == ("error", "why")
    else:
        assert answer == Rejected(id="a", reason="why", retry_after=later)  # type: ignore[arg-type]


def test_facts_and_load_of_vllm() -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, _):
            facts = link.facts
            assert facts is not None
            assert (facts.kind, facts.model, facts.max_model_len) == ("vllm", "smol", 1024)
            assert (facts.block_tokens, facts.kv_tokens) == (128, 128 * 182)
            assert not facts.resumes
            assert facts.boot == "1795649791.26"
            report = events.reports[0]
            load = report.load
            assert (load.running, load.short_waiting, load.kv_usage) == (3, 2, 0.25)
            link.set_role("long")
            link.drain(True)
            await events.until(lambda: events.reports[-1].draining)
            assert events.reports[-1].role == "long"

    run(main())


def test_facts_of_sglang_with_and_without_details() -> None:
    async def main() -> None:
        info = {"page_size": 32, "internal_states": [{"max_total_num_tokens": 4096}]}
        async with linked("sglang", info=info) as (link, events, _):
            facts = link.facts
            assert facts is not None
            assert (facts.block_tokens, facts.kv_tokens) == (32, 4096)
            assert events.reports[0].load.running == 3
            assert events.reports[0].ready
        async with linked("sglang", metrics="") as (link, events, _):
            facts = link.facts
            assert facts is not None
            assert (facts.block_tokens, facts.kv_tokens) == (1, 0)
            assert facts.boot
            assert events.reports[0].load.running == 0

    run(main())


def test_an_abort_ends_the_stream_there() -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            server.gate.clear()
            link.send(add("a", PROMPT))
            await events.until(lambda: events.outputs("a"))
            assert server.open == 1
            link.send(AbortRequest("a"))
            link.send(AbortRequest("a"))
            await events.until(lambda: server.open == 0 and events.reports[-1].requests == 0)
            assert events.tokens("a") == PROMPT[:1]
            assert link.connected

    run(main())


def test_an_answer_that_breaks_off_moves_everything() -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            server.gate.clear()
            link.send(add("a", PROMPT))
            link.send(add("b", PROMPT))
            await events.until(lambda: events.outputs("a") and events.outputs("b"))
            server.breaks = True
            server.gate.set()
            await events.until(lambda: len(events.losses) == 1)
            assert "an answer broke off" in events.losses[0]
            server.breaks = False
            await events.until(lambda: len(events.boots) == 2)
            await ask(link, events, add("a", PROMPT))
            assert events.finish("a") == "stop"

    run(main())


def test_health_decides_and_a_hang_is_its_silence() -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            server.healthy = False
            await events.until(lambda: len(events.losses) == 1)
            assert events.losses[0] == "/health says 503"
            with pytest.raises(LinkDown, match="no connection"):
                link.send(add("a"))
            server.healthy = True
            await events.until(lambda: len(events.boots) == 2)
        async with linked("vllm", liveness=0.2) as (link, events, server):
            server.hangs = True
            await events.until(lambda: len(events.losses) == 1)
            assert "no answer to /health" in events.losses[0]

    run(main())


def test_late_metrics_cost_news_of_the_load_and_nothing_else() -> None:
    async def main() -> None:
        async with linked("vllm") as (link, events, server):
            before = link.last_report
            server.mute = True
            asked = server.asked
            await events.until(lambda: server.asked > asked + 1)
            assert not events.losses
            assert link.last_report == before

    run(main())


def test_silence_on_all_streams_is_a_hang_whatever_health_says() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        async with linked("vllm", stall=60.0, clock=lambda: now) as (link, events, server):
            now = 100.0
            server.gate.clear()
            link.send(add("a", PROMPT))
            await events.until(lambda: events.outputs("a"))
            now = 159.0
            seen = len(events.reports)
            await events.until(lambda: len(events.reports) > seen + 2)
            assert not events.losses
            now = 161.0
            await events.until(lambda: events.losses)
            assert events.losses == ["nothing came for 1 requests in 60 s"]

    run(main())


def test_a_wrong_key_is_refused_for_good() -> None:
    async def main() -> None:
        async with serving(FakeServer(vllm_events, key="right")) as server:
            link = HttpLink(
                server.url,
                Recorder(),
                VllmDialect(),
                api_key="wrong",
                times=HttpLinkTimes(backoff=FAST),
            )
            with pytest.raises(LinkRefused, match="401"):
                await link.run()

    run(main())


def test_samples_are_summed_over_labels() -> None:
    text = '# c\nx{a="1"} 2\nx{a="2"} 3.5\ny 1e3\nz_info{n="4",m="x"} 1.0\nbad line\n'
    found = samples(text)
    assert found == {"x": 5.5, "y": 1000.0, "z_info": 1.0, "z_info.n": 4.0}
