"""A live server whose engine is the fake core, run in a thread of the test process."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import CORE
from pla_serve.server.embedding_model import EmbeddingModel
from pla_serve.server.engine.process import EngineSpec
from pla_serve.server.generation.defaults import SamplingDefaults
from pla_serve.server.generation.detokenize import _byte_spelling
from pla_serve.server.model import ServedModel
from pla_serve.server.run import InstanceServer, listen
from pla_serve.server.settings import ServerSettings
from pla_serve.wire.engine import Grammar

ROOT = Path(__file__).parents[2]
ENGINE_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Where engine processes find the fake core, and whatever this process finds."""
MODEL = "org/echo"
CONTEXT = 512
DEADLINE = 120.0
"""Seconds after which a test stops hoping: more than anything takes where other programs leave a
tenth of a processor."""

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


def make_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, special: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Every byte is a token with the byte as its id; 256 is EOS, and ``special`` follow."""
    alphabet = sorted(_byte_spelling().items(), key=lambda item: item[1])
    backend = Tokenizer(models.BPE(vocab=dict(alphabet), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    return tokenizer


async def check_grammar(grammar: Grammar, tenant: str) -> None:
    """As strict as the tests need: a schema's type must be one of JSON's."""
    if '"type": "nonsense"' in grammar.spec:
        raise ValueError("nonsense is not a type")


def children_that_run(pid: int, module: str) -> list[int]:
    """Child processes of ``pid`` that run a module; others may be there, such as for grammars."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for task in tasks for word in task.read_text().split()]
    return [child for child in children if module in Path(f"/proc/{child}/cmdline").read_text()]


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """Polls, so that a test waits for a fact and not for a time; returns the truthy value."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true within {DEADLINE} s")


class Live:
    """One running server. With ``engine``, a config, a real engine runs in the fake one's place."""

    def __init__(self, *, env: dict[str, str] | None = None, **settings: Any) -> None:
        template = settings.pop("chat_template", CHAT_TEMPLATE)
        special = settings.pop("special", ())
        port = settings.pop("listen_port", 0)
        config = EngineConfig(
            model=settings.pop("model", MODEL), max_model_len=settings.pop("context", CONTEXT)
        )
        real = settings.pop("engine", None)
        self._defaults = settings.pop("defaults", SamplingDefaults())
        self._embeddings = settings.pop("embeddings", EmbeddingModel())
        self.settings = ServerSettings(
            **{"model_names": (MODEL, "alias"), "model_root": "somewhere", **settings}
        )
        self._spec = EngineSpec(
            real or config,
            factory=CORE if real else "tests.server.fake_core:FakeCore",
            env={"PYTHONPATH": ENGINE_PATH, **(env or {})},
        )
        self._tokenizer = make_tokenizer(template, special)
        self._listener = listen("127.0.0.1", port)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.status: Future[int] = Future()
        self._instance: Future[InstanceServer] = Future()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def instance(self) -> InstanceServer:
        return self._instance.result(DEADLINE)

    def wait_ready(self) -> None:
        until(lambda: httpx.get(f"{self.url}/ready").status_code == 200, "readiness")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{
                "base_url": f"{self.url}/v1",
                "api_key": "key",
                "max_retries": 0,
                "timeout": DEADLINE,
                **options,
            }
        )

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample."""
        labels = {"model_name": MODEL, **labels}
        value = self.instance.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    def stop(self) -> int:
        if not self.status.done():
            self._loop.call_soon_threadsafe(self.instance.stop)
        return self.status.result(DEADLINE)

    def close(self) -> None:
        self.stop()
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        async def main() -> int:
            self._loop = asyncio.get_running_loop()
            instance = InstanceServer(
                self.settings,
                self._spec,
                ServedModel(
                    self._tokenizer,
                    check_grammar,
                    defaults=self._defaults,
                    embeddings=self._embeddings,
                ),
            )
            self._instance.set_result(instance)
            return await instance.run(self._listener)

        try:
            self.status.set_result(asyncio.run(main()))
        except BaseException as error:
            if not self._instance.done():
                self._instance.set_exception(error)
            self.status.set_exception(error)
