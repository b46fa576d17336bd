"""The whole of ``pla-serve serve``: command, server and engine, on a tiny random model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from transformers import LlamaConfig

from tests.server.offline.batch_client import (
    chat_line,
    check_answers,
    jsonl,
    read_lines,
    submit,
    wait_over,
)
from tests.server.server_harness import DEADLINE, children_that_run, make_tokenizer, until

NAME = "tiny"
OTHER_KEY = "of another tenant"
HELLO = [{"role": "user", "content": "hello there"}]
PROMPT = "<user>hello there<assistant>"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "ok": {"type": "boolean"}},
    "required": ["colour", "ok"],
    "additionalProperties": False,
}
START_SECONDS = 120.0
TIERS = ("interactive:ttft=500s,tpot=100s", "beyond-reach:ttft=1ms,tpot=1ms", "bulk")


@dataclass
class Server:
    child: subprocess.Popen[bytes]
    url: str
    told: str
    """What it printed when it was ready."""

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": "Bearer secret"}).text
        found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return float(found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer; the weights are made up."""
    path = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save_pretrained(path)
    LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=256,
        bos_token_id=None,
    ).save_pretrained(path)
    return path


def command(folder: Path | str, *flags: str) -> list[str]:
    words = f"serve {folder} --load-format dummy --port 0 --threads 1 --kv-cache-gib 0.02"
    return [sys.executable, "-m", "pla_serve", *words.split(), *flags]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = ("--api-key", "secret", "--api-key", OTHER_KEY)
    batches = ("--batch-dir", str(tmp_path_factory.mktemp("batches")), "--batch-free-mib", "0")
    tiers = [word for text in TIERS for word in ("--tier", text)]
    tiers += ["--key-tier", f"{OTHER_KEY}=bulk"]
    flags = ("--served-model-name", NAME, *keys, "--keep-alive-seconds", "0.5", *batches, *tiers)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command(folder, *flags), stdout=subprocess.PIPE, env=env) as child:
        try:
            assert child.stdout is not None
            told = (child.stdout.readline() + child.stdout.readline()).decode()
            found = re.search(r"http://127\.0\.0\.1:\d+", told)
            assert found, f"not ready: {told}"
            yield Server(child, found[0], told)
            child.send_signal(signal.SIGTERM)
            assert child.wait(DEADLINE) == 0
        finally:
            child.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    options = {"api_key": "secret", "max_retries": 0, "timeout": START_SECONDS}
    with openai.OpenAI(base_url=f"{server.url}/v1", **options) as client:
        yield client


def test_ready_line_says_what_to_try(server: Server) -> None:
    assert "curl http://" in server.told
    assert NAME in server.told
    assert "secret" not in server.told


def test_tiers_are_promised_or_refused_at_once(server: Server, client: openai.OpenAI) -> None:
    """While a stream runs, whose end nobody can wait for. Alone, the same request is taken."""
    ask = partial(client.chat.completions.create, model=NAME, messages=HELLO)
    begin = partial(ask, stream=True, max_tokens=400, extra_body={"ignore_eos": True})

    def refused() -> openai.RateLimitError | None:
        with begin(service_tier="interactive") as stream:
            assert next(iter(stream)).service_tier == "interactive"
            try:
                ask(max_tokens=1, service_tier="beyond-reach")
            except openai.RateLimitError as error:
                return error
            return None  # the stream was over before the request came

    error = until(refused, "a refusal")
    assert "promised" in error.message
    assert int(error.response.headers["retry-after"]) >= 1
    until(lambda: server.metric("vllm:num_requests_running") == 0, "an idle engine")
    assert ask(max_tokens=2, service_tier="beyond-reach").service_tier == "beyond-reach"
    assert ask(max_tokens=2).service_tier == "default"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=OTHER_KEY, max_retries=0) as other:
        answer = other.chat.completions.create(model=NAME, messages=HELLO, max_tokens=2)
        assert answer.service_tier == "bulk"
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer secret"}).text
    row = r'tier_requests_total{.*outcome="(\w+)",tier="beyond-reach"} (\S+)'
    found = dict(re.findall(row, text))
    assert float(found["refused"]) >= 1
    assert float(found["late_first_token"]) >= 1


def test_embeddings_of_a_real_engine(server: Server, client: openai.OpenAI) -> None:
    """Alone, in a batch, as tokens, with the prefix cached or not: the same vectors of length 1."""
    texts = ["hello there", "another text", "hello there, again and again"]
    batch = [row.embedding for row in client.embeddings.create(model=NAME, input=texts).data]
    assert [len(row) for row in batch] == [32] * 3
    for text, row in zip(texts, batch, strict=True):
        assert sum(number * number for number in row) == pytest.approx(1, abs=1e-5)
        plain = client.embeddings.create(model=NAME, input=text, encoding_format="float")
        assert plain.data[0].embedding == pytest.approx(row, abs=1e-4)
    score = {"text_1": texts[0], "text_2": texts[:2]}
    answer = httpx.post(
        f"{server.url}/v1/score", json=score, headers={"Authorization": "Bearer secret"}
    )
    scores = [each["score"] for each in answer.json()["data"]]
    cosine = sum(a * b for a, b in zip(batch[0], batch[1], strict=True))
    assert scores == pytest.approx([1, cosine], abs=1e-4)


def test_offline_batch(client: openai.OpenAI) -> None:
    lines = [chat_line(str(i), "hello " * (i + 1), temperature=0) for i in range(12)]
    batch = wait_over(client, submit(client, jsonl(lines)).id)
    assert batch.status == "completed"
    check_answers(client, batch, [str(i) for i in range(12)])
    answer = read_lines(client, batch.output_file_id)[3]["response"]["body"]
    online = client.chat.completions.create(**lines[3]["body"], model=NAME)
    assert answer["choices"][0]["message"]["content"] == online.choices[0].message.content


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert 1 <= answer.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == answer.choices[0].message.content


def test_followers_of_n_find_the_prompt_cached(server: Server, client: openai.OpenAI) -> None:
    prompt = "a prompt of some length that nobody else sends. " * 4
    before = server.metric("vllm:prefix_cache_hits_total")
    answer = client.completions.create(
        model=NAME, prompt=prompt, n=4, max_tokens=4, seed=5, extra_body={"ignore_eos": True}
    )
    assert len({choice.text for choice in answer.choices}) > 1  # seeds differ
    assert answer.usage.completion_tokens == 16
    until(lambda: server.metric("vllm:prefix_cache_hits_total") - before >= 3 * 176, "reuse")


def test_tenants_are_not_told_of_each_others_prompts(server: Server, client: openai.OpenAI) -> None:
    def cached(key: str, cache_salt: str | None = None) -> int:
        extra = {} if cache_salt is None else {"cache_salt": cache_salt}
        answer = client.with_options(api_key=key).completions.create(
            model=NAME, prompt="whose prompt is this? " * 9, max_tokens=1, extra_body=extra
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("secret") == 0
    assert cached("secret") > 100
    assert cached(OTHER_KEY) == 0
    assert cached(OTHER_KEY) > 100, "each key has a cache of its own"
    assert cached("secret", "salt") == 0
    assert cached("secret", "salt") > 100


def test_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": "x", "max_tokens": 12, "seed": 7}
    texts = {client.completions.create(**options).choices[0].text for _ in range(3)}
    assert len(texts) == 1


def test_json_schema_is_obeyed(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            seed=seed,
            max_tokens=300,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            },
        )
        value = json.loads(answer.choices[0].message.content)
        assert value["colour"] in ("red", "green")
        assert isinstance(value["ok"], bool)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[0-9]{3}"}, r"\d{3}"),
        ({"choice": ["yes (1)", "no\nway", "a.b"]}, r"yes \(1\)|no\nway|a\.b"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ],
)
def test_constraints_are_obeyed(
    client: openai.OpenAI, constraint: dict[str, object], pattern: str
) -> None:
    answer = client.completions.create(
        model=NAME, prompt="x", max_tokens=30, extra_body={"structured_outputs": constraint}
    )
    assert re.fullmatch(pattern, answer.choices[0].text)


@pytest.mark.parametrize(
    "constraint",
    [{"json": {"type": "nonsense"}}, {"regex": "("}, {"grammar": "start: nowhere"}],
)
def test_bad_constraints_are_refused(client: openai.OpenAI, constraint: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match="constraint"):
        client.completions.create(
            model=NAME, prompt="x", extra_body={"structured_outputs": constraint}
        )


def test_logprobs_belong_to_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the likeliest
        assert len(entry.top_logprobs) == 3


def test_stop_string_cuts_what_greedy_says(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": [1, 2, 3], "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:2]
    answer = client.completions.create(**options, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_prompts_that_cannot_be_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="260"):
        client.completions.create(model=NAME, prompt=[260])


def test_closing_a_stream_frees_its_memory(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt="x", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until(lambda: server.metric("vllm:num_requests_running") == 0, "the end of it")
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_killed_engine_comes_back(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt="x", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    (engine,) = children_that_run(server.child.pid, "pla_serve.engine.host.process")
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="killed by SIGKILL"):
        list(stream)
    assert httpx.get(f"{server.url}/ready").status_code == 503
    answer = client.completions.create(model=NAME, prompt="x", max_tokens=3)  # waits for it
    assert answer.usage.completion_tokens >= 1
    assert server.metric("pla_serve:engine_restarts_total") == 1


def test_a_file_is_answered_without_a_server(folder: Path, tmp_path: Path) -> None:
    """``pla-serve batch`` starts an engine, is stopped by Ctrl-C, and goes on."""
    input, output = tmp_path / "in", tmp_path / "out"
    lines = [chat_line(f"{i}", "hello", temperature=0, seed=i) for i in range(150)]
    input.write_bytes(jsonl([*lines, chat_line("wrong", nonsense=1)]))
    words = f"batch {input} -o {output} --model {folder} --load-format dummy --lines-at-once 2"
    flags = ["--threads", "1", "--kv-cache-gib", "0.02"]
    command = [sys.executable, "-m", "pla_serve", *words.split(), *flags]

    def answered() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
        until(lambda: answered() >= 5, "the first answers")
        child.send_signal(signal.SIGINT)
        told = child.communicate(timeout=DEADLINE)[1].decode()
        assert child.returncode == 130, told
    assert 5 <= answered() < 151
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "(1 with an error)" in done.stderr
    found = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert sorted(line["id"] for line in found) == sorted(f"batch_req_{n}" for n in range(1, 152))
    texts = {
        line["response"]["body"]["choices"][0]["message"]["content"]
        for line in found
        if line["custom_id"] != "wrong"
    }
    assert len(texts) == 1, "greedy answers to one prompt are one text"
