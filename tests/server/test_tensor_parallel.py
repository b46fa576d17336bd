"""``pla-serve serve -tp 2`` on the CPU: two ranks answer, and when one dies, both are replaced."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from transformers import LlamaConfig

from tests.server.server_harness import DEADLINE, children_that_run, make_tokenizer, until

ENGINE, FOLLOWER = "pla_serve.engine.host.process", "pla_serve.engine.host.follower"

START_SECONDS = 120.0
STREAM = {"stream": True, "max_tokens": 500, "extra_body": {"ignore_eos": True}}
GREEDY = {"model": "tiny", "prompt": "a few words", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save_pretrained(path)
    LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=256,
        bos_token_id=None,
    ).save_pretrained(path)
    return path


def serve(folder: Path, *flags: str) -> list[str]:
    words = f"serve {folder} --load-format dummy --port 0 --threads 2 --kv-cache-gib 0.02"
    return [sys.executable, "-m", "pla_serve", *words.split(), *flags]


def is_alive(pid: int) -> bool:
    """A process that was killed and not yet waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_ranks_serve_and_die_together(folder: Path) -> None:
    flags = ("-tp", "2", "--served-model-name", "tiny")
    with subprocess.Popen(serve(folder, *flags), stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            told = (server.stdout.readline() + server.stdout.readline()).decode()
            found = re.search(r"http://127\.0\.0\.1:\d+", told)
            assert found, f"not ready: {told}"
            options = {"api_key": "x", "max_retries": 0, "timeout": START_SECONDS}
            with openai.OpenAI(base_url=f"{found[0]}/v1", **options) as client:
                use(client, found[0], server.pid)
            server.send_signal(signal.SIGTERM)
            assert server.wait(DEADLINE) == 0
        finally:
            server.kill()


def use(client: openai.OpenAI, url: str, server: int) -> None:
    answers = {client.completions.create(**GREEDY).choices[0].text for _ in range(2)}
    assert len(answers) == 1
    (engine,) = children_that_run(server, ENGINE)
    (follower,) = children_that_run(engine, FOLLOWER)

    stream = client.completions.create(model="tiny", prompt="x", **STREAM)
    next(iter(stream))
    os.kill(follower, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)
    answers.add(client.completions.create(**GREEDY).choices[0].text)  # waits for the next engine
    assert len(answers) == 1
    assert "engine_restarts_total{" in httpx.get(f"{url}/metrics").text

    (engine,) = children_that_run(server, ENGINE)
    (follower,) = children_that_run(engine, FOLLOWER)
    stream = client.completions.create(model="tiny", prompt="x", **STREAM)
    next(iter(stream))
    os.kill(engine, signal.SIGKILL)
    until(lambda: not is_alive(follower), "the end of rank 1")
    with pytest.raises(openai.APIError, match="killed by SIGKILL"):
        list(stream)
