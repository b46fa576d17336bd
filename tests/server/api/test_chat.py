"""Chat through the openai client, against the echo engine."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.server.fake_core import (
    CRASH_SEED,
    ERROR_SEED,
    REJECT_FOR_GOOD_SEED,
    REJECT_SEED,
    SILENT_SEED,
)
from tests.server.server_harness import CONTEXT, MODEL, Live, until

HELLO = [{"role": "user", "content": "hello"}]
ECHO = "<user>hello<assistant>"


def test_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer._request_id.startswith("req-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == ECHO
    assert choice.finish_reason == "stop"
    assert choice.model_extra["stop_reason"] is None
    assert answer.usage.prompt_tokens == len(ECHO)
    assert answer.usage.completion_tokens == len(ECHO) + 1  # EOS counts
    assert answer.usage.total_tokens == 2 * len(ECHO) + 1


def test_repeated_prompt_reports_cached_tokens(client: openai.OpenAI) -> None:
    def cached() -> int:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "only here"}]
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() == len("<user>only here<assistant>") - 1


def test_streams_what_it_would_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == ECHO
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        "stop"
    ]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(ECHO) + 1


def test_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_continuous_usage_counts_up(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(ECHO) + 1


def test_stream_bytes_are_events(live: Live) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 2}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_characters_of_several_tokens_come_whole(client: openai.OpenAI) -> None:
    text = "grüße \N{GRINNING FACE} 漢字"
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == f"<user>{text}<assistant>"
    assert not any("\ufffd" in part for part in parts)


def test_length_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=3, max_tokens=100
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == ECHO[:3]


def test_default_output_fills_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("include", "text"), [(False, "<user>he"), (True, "<user>hell")], ids=["cut", "kept"]
)
def test_stop_string(client: openai.OpenAI, stream: bool, include: bool, text: str) -> None:
    result = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stop=["zzz", "ll", "hellx"],
        stream=stream,
        extra_body={"include_stop_str_in_output": include},
    )
    if stream:
        chunks = list(result)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
        last = chunks[-1].choices[0]
    else:
        last = result.choices[0]
        assert last.message.content == text
        assert result.usage.completion_tokens == len("<user>hell")
    assert last.finish_reason == "stop"
    assert last.model_extra["stop_reason"] == "ll"


def test_stop_string_frees_the_engine(live: Live, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL, messages=HELLO, stop="<assistant>", extra_body={"ignore_eos": True}
    )
    until(lambda: live.metric("vllm:num_requests_running") == 0)


def test_stop_token_is_reported_and_not_shown(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"stop_token_ids": [ord("l")]}
    )
    assert answer.choices[0].message.content == "<user>he"
    assert answer.choices[0].model_extra["stop_reason"] == ord("l")


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_share_the_prompt(live: Live, client: openai.OpenAI, stream: bool) -> None:
    result = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"n {stream}"}],
        n=3,
        seed=2**63 - 1,
        stream=stream,
        stream_options={"include_usage": True} if stream else openai.omit,
    )
    expected = f"<user>n {stream}<assistant>"
    if stream:
        texts = ["", "", ""]
        ends = []
        for chunk in result:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends += [choice.finish_reason] if choice.finish_reason else []
            usage = chunk.usage
        assert ends == ["stop"] * 3
    else:
        texts = [choice.message.content for choice in result.choices]
        assert [choice.index for choice in result.choices] == [0, 1, 2]
        usage = result.usage
    assert texts == [expected] * 3
    assert usage.prompt_tokens == len(expected)  # once, not three times
    assert usage.completion_tokens == 3 * (len(expected) + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    result = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "ü"}],
        logprobs=True,
        top_logprobs=2,
        max_tokens=9,
        stream=stream,
    )
    if stream:
        content = [
            entry
            for chunk in result
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
    else:
        content = result.choices[0].logprobs.content
    assert len(content) == 9
    assert [entry.token for entry in content[:6]] == list("<user>")
    assert bytes(content[6].bytes + content[7].bytes).decode() == "ü"
    assert content[0].logprob == -0.5
    assert [top.token for top in content[0].top_logprobs] == ["<", "="]


def test_no_logprobs_unless_asked(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    assert answer.choices[0].logprobs is None


def test_json_schema_reaches_the_engine(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"grammar": {"type": "string"}}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content) == {"grammar": "json_schema"}


def test_bad_schema_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nonsense is not a type"):
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )


def test_parts_and_roles_reach_the_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ],
        extra_body={"chat_template_kwargs": {"mood": "!"}},
    )
    assert answer.choices[0].message.content == "<system>be kind<user>a<assistant>!"


def test_continues_the_final_message(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*HELLO, {"role": "assistant", "content": "so"}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert answer.choices[0].message.content == "<user>hello<assistant>so"


def test_template_that_refuses_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no such role"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )


def test_model_without_template_says_so(serve) -> None:
    with (
        serve(chat_template=None).client() as client,
        pytest.raises(openai.BadRequestError, match="--chat-template"),
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO)


def test_wrong_key(serve) -> None:
    server = serve(api_keys=("right", "also right"))
    for key in ("right", "also right"):
        with server.client(api_key=key) as client:
            assert client.models.list().data[0].id == MODEL
    with server.client(api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.code == "invalid_api_key"
    for path in ("/health", "/ready", "/version"):
        assert httpx.get(server.url + path).status_code == 200
    assert httpx.get(server.url + "/metrics").status_code == 401
    right = {"Authorization": "Bearer right"}
    assert httpx.get(server.url + "/metrics", headers=right).status_code == 200
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/v1/nowhere").status_code == 401


def test_a_key_for_metrics_reads_nothing_else(serve) -> None:
    server = serve(api_keys=("right",), metrics_key="scraper")
    scraper = {"Authorization": "Bearer scraper"}
    assert httpx.get(server.url + "/metrics", headers=scraper).status_code == 200
    assert httpx.get(server.url + "/v1/models", headers=scraper).status_code == 401
    alone = serve(metrics_key="scraper")
    assert httpx.get(alone.url + "/metrics").status_code == 401
    assert httpx.get(alone.url + "/v1/models").status_code == 200


def test_too_long_a_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 1000}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(caught.value)
    assert str(1000 + len("<user><assistant>")) in str(caught.value)


def test_too_much_output_for_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_alias_is_answered_under_its_name(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="alias", messages=HELLO, max_tokens=1)
    assert answer.model == "alias"


@pytest.mark.parametrize("stream", [False, True])
def test_over_capacity(live: Live, client: openai.OpenAI, stream: bool) -> None:
    before = live.metric("pla_serve:requests_rejected_total", reason="capacity")
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, seed=REJECT_SEED, stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.code == "rate_limit_exceeded"
    assert live.metric("pla_serve:requests_rejected_total", reason="capacity") == before + 1


def test_what_the_engine_never_takes_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="never"):
        client.chat.completions.create(model=MODEL, messages=HELLO, seed=REJECT_FOR_GOOD_SEED)


def test_failed_request_is_a_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="told to fail"):
        client.chat.completions.create(model=MODEL, messages=HELLO, seed=ERROR_SEED)


def test_failed_stream_ends_with_an_error_event(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, seed=ERROR_SEED, stream=True
    )
    with pytest.raises(openai.APIError, match="told to fail"):
        list(stream)


def test_closing_the_stream_cancels(live: Live, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until(lambda: live.metric("vllm:num_requests_running") == 0)


def test_silent_stream_is_kept_alive(serve) -> None:
    server = serve(keep_alive_seconds=0.02)
    body = {"messages": HELLO, "stream": True, "seed": SILENT_SEED}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
    until(lambda: server.metric("vllm:num_requests_running") == 0)


def test_crash_ends_the_stream_with_an_error(serve) -> None:
    server = serve()
    with server.client() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=HELLO, seed=CRASH_SEED, stream=True
        )
        with pytest.raises(openai.APIError, match="the engine failed; the server's log says why"):
            list(stream)
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
        assert answer.choices[0].message.content == ECHO
