"""Clients with many dependencies, in an environment of their own.

To be run by hand: ``PLA_SERVE_OTHER_CLIENTS=FOLDER pytest tests/clients/test_other_clients.py``.
FOLDER is a virtual environment; where there is none, it is made (about a gigabyte).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.clients.conftest import ScriptedServer, call
from tests.server.server_harness import MODEL, make_tokenizer

FOLDER = os.environ.get("PLA_SERVE_OTHER_CLIENTS")
OTHERS = Path(__file__).with_name("others")
PARIS = call("get_weather", city="Paris")
WEATHER = {"city": "Paris", "degrees": 21}
OBJECT = json.dumps(WEATHER)

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="run by hand: it needs an environment of its own"
)


@pytest.fixture(scope="session")
def python() -> Path:
    """Python of the environment."""
    found = Path(FOLDER or "") / "bin" / "python"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        needed = ["-r", str(OTHERS / "requirements.txt")]
        subprocess.run([found, "-m", "pip", "install", "-q", *needed], check=True)
    return found


def run(python: Path, name: str, url: str, *more: str) -> list[str]:
    """Run one task; the lines that it prints before the last, which says that all is done."""
    command = [python, OTHERS / f"{name}_task.py", url, MODEL, *more]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "1"}
    done = subprocess.run(
        command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=120
    )
    *lines, last = done.stdout.splitlines() or [""]
    assert last == "all done", done.stderr[-3000:]
    return lines


def test_langchain_openai(scripted: ScriptedServer, python: Path) -> None:
    for api in ("chat", "responses"):
        scripted.say(f"LangChain, a tool by {api}", "I look." + PARIS, "It is sunny.")
        scripted.say(f"LangChain, an object by {api}", OBJECT)
    run(python, "langchain_openai", scripted.url)


def test_litellm(scripted: ScriptedServer, python: Path) -> None:
    for api in ("chat", "responses"):
        scripted.say(f"litellm, a tool by {api}", "I look." + PARIS, "It is sunny.")
    run(python, "litellm", scripted.url)


def test_pydantic_ai(scripted: ScriptedServer, python: Path) -> None:
    for api in ("chat", "responses"):
        about = f"pydantic-ai by {api}, answered by"
        scripted.say(f"{about} a tool", PARIS, call("final_result", **WEATHER))
        scripted.say(f"{about} its form", PARIS, OBJECT)
    run(python, "pydantic_ai", scripted.url)


def test_lm_eval(scripted: ScriptedServer, python: Path, tmp_path: Path) -> None:
    """Its scores of choices are the sums of what the server says of their tokens."""
    make_tokenizer().save_pretrained(tmp_path)
    (line,) = run(python, "lm_eval", scripted.url, str(tmp_path))[-1:]
    found = json.loads(line)
    for text, choices, got in (("aaa", ("a", "zzz"), found[0]), ("bb", ("b", "yyyy"), found[1])):
        for choice, (score, _) in zip(choices, got, strict=True):
            body = {"prompt": f"{text} {choice}", "echo": True, "logprobs": 1, "max_tokens": 1}
            answer = httpx.post(f"{scripted.url}/completions", json=body).json()
            values = answer["choices"][0]["logprobs"]["token_logprobs"]
            assert float(score) == pytest.approx(sum(values[len(text) : -1]))
