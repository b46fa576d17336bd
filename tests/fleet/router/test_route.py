"""The router as clients see it: OpenAI's client, the real API server, real links, fake engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anthropic
import httpx
import openai
import pytest

from pla_serve.fleet.link import http, own
from pla_serve.fleet.route_command import RouteSettings, make_links
from pla_serve.fleet.router.contract import FleetOptions
from tests.command_runner import pla_serve
from tests.fleet.router.routed import KEY, Routed
from tests.server.fake_core import GATED_SEED, REJECT_SEED
from tests.server.server_harness import (
    MODEL,
    Live,
    until,
)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., tuple[Routed, list[Live], Path]]]:
    """Starts instances and a router before them."""
    started: list[Any] = []

    def start(count: int = 2, **options: Any) -> tuple[Routed, list[Live], Path]:
        gate = tmp_path / "gate"
        env = {"FAKE_GATE": str(gate)}
        lives = [Live(env=env, link_key=KEY) for _ in range(count)]
        started.extend(lives)
        for live in lives:
            live.wait_ready()
        routed = Routed(lives, **options)
        started.insert(0, routed)
        return routed, lives, gate

    yield start
    for each in started:
        each.close()


def holder(lives: list[Live]) -> Live:
    """The instance on which the only request runs."""

    def find() -> list[Live]:
        return [
            live
            for live in lives
            if live.instance.metrics.registry.get_sample_value(
                "vllm:num_requests_running", {"model_name": MODEL}
            )
        ]

    found: list[Live] = until(find, "a running request")
    return found[0]


def test_a_stream_survives_its_engine_token_for_token(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    routed, lives, gate = fleet()
    text = "the quick brown fox"
    with routed.client() as client:
        stream = client.completions.create(
            model=MODEL, prompt=text, max_tokens=60, seed=GATED_SEED, stream=True
        )
        events = iter(stream)
        said = next(events).choices[0].text
        victim = holder(lives)
        pid = victim.instance.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: routed.metric("moved_total") == 1, "the failover")
        gate.touch()
        said += "".join(event.choices[0].text for event in events)
    assert said == text
    assert routed.metric("requests_in_flight") == 0
    until(lambda: routed.metric("instance_up") == 2, "its return")


def test_a_full_fleet_is_429_with_retry_after(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    routed, _, _ = fleet()
    with routed.client() as client, pytest.raises(openai.RateLimitError) as refusal:
        client.completions.create(model=MODEL, prompt="abc", seed=REJECT_SEED)
    assert refusal.value.response.headers["retry-after"] == "2"
    assert routed.metric("refused_total") == 1


def test_tool_calls_through_a_router(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    """The router reads the calls: its instance sends nothing but tokens."""
    template = "{# tools #}{{ messages[-1].content }}"
    routed, _, _ = fleet(1, chat_template=template, server={"tool_parser": "hermes"})
    text = 'Hm. <tool_call>{"name": "now", "arguments": {"zone": "CET"}}</tool_call>'
    tools: Any = [{"type": "function", "function": {"name": "now"}}]
    messages: Any = [{"role": "user", "content": text}]
    with routed.client() as client:
        choice = client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools
        ).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Hm."
        called = choice.message.tool_calls[0].function
        assert (called.name, called.arguments) == ("now", '{"zone": "CET"}')
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, tools=tools, stream=True
        )
        parts = [part for c in stream for part in c.choices[0].delta.tool_calls or []]
    assert "".join(part.function.arguments for part in parts) == '{"zone": "CET"}'


def test_embeddings_through_a_router(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    routed, _, _ = fleet()
    with routed.client() as client:
        answer = client.embeddings.create(model=MODEL, input=["a", [99, 98]])
    assert [row.embedding for row in answer.data] == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3
    assert routed.metric("requests_in_flight") == 0


def test_messages_through_a_router(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    """The router reads the format off its own template, and answers in Anthropic's words."""
    template = "{# tools #}{{ messages[-1].content }}"
    options: Any = {"tool_parser": "hermes", "reasoning_parser": "qwen3"}
    routed, _, _ = fleet(1, chat_template=template, server=options)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    messages: Any = [{"role": "user", "content": f"<think>hm</think>I look.\n{call}"}]
    tools: Any = [{"name": "now", "input_schema": {"type": "object"}}]
    fields: Any = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": tools}
    with anthropic.Anthropic(base_url=routed.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        counted = client.messages.count_tokens(model=MODEL, messages=messages)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**fields, "model": "other"})
    for found in (answer, streamed):
        assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]
        assert found.stop_reason == "tool_use"
    assert counted.input_tokens == len(messages[0]["content"])


def test_without_instances_requests_wait_and_then_fail(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    routed, lives, _ = fleet(1)
    lives[0].stop()
    until(lambda: httpx.get(f"{routed.url}/ready").status_code == 503, "unreadiness")
    with routed.client() as client, pytest.raises(openai.InternalServerError) as failure:
        client.completions.create(model=MODEL, prompt="abc")
    assert failure.value.status_code == 503


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--instance", "somewhere"], "http://HOST:PORT"),
        (["--instance", "http://a:1", "--instance", "vllm+http://a:1/"], "named twice"),
        (["--instance", "http://a:1", "--circuit-failures", "0"], "at least 1 failure"),
        (["--instance", "http://a:1", "--routing", "nowhere"], "unknown routing"),
        (["--instance", "http://a:1", "--liveness-seconds", "0"], "must be positive"),
        ([], "--instance"),
    ],
)
def test_mistakes_are_named_before_anything_starts(words: list[str], says: str) -> None:
    result = pla_serve("route", "m", *words)
    assert result.exit_code != 0
    assert says in " ".join(result.output.split())


@pytest.mark.parametrize(("told", "waits"), [(None, (2.0, 5.0, 5.0)), (1.0, (1.0, 1.0, 1.0))])
def test_servers_without_a_heartbeat_have_longer_to_answer(
    told: float | None, waits: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def own_link(*args: Any, liveness_seconds: float, **kwargs: Any) -> None:
        found.append(liveness_seconds)

    def http_link(*args: Any, times: http.HttpLinkTimes, **kwargs: Any) -> None:
        found.append(times.liveness)

    monkeypatch.setattr(own, "InstanceLink", own_link)
    monkeypatch.setattr(http, "HttpLink", http_link)
    settings = RouteSettings(
        instances=("http://a:1", "vllm+http://b:1", "sglang+http://c:1"),
        instance_key=None,
        liveness_seconds=told,
        routing="auto",
        fleet=FleetOptions(),
        controller="off",
        control_seconds=1.0,
    )
    for make in make_links(settings):
        make(cast(Any, None))
    assert tuple(found) == waits


def test_the_responses_api_and_its_store_are_the_routers(
    fleet: Callable[..., tuple[Routed, list[Live], Path]],
) -> None:
    routed, _, gate = fleet()
    with routed.client() as client:
        first = client.responses.create(input="one")
        second = client.responses.create(input="two", previous_response_id=first.id)
        assert "<user>one<assistant>" in second.output_text
        with client.responses.stream(model=MODEL, input="hello") as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text.startswith("<user>hello")
        assert kinds[0] == "response.created"
        background = client.responses.create(
            input="hello", background=True, extra_body={"seed": GATED_SEED}
        )
        gate.touch()
        until(lambda: client.responses.retrieve(background.id).status == "completed")
