"""An engine that says nothing any more is ended, and one that cannot be started is tried again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
from transformers import LlamaConfig

from pla_serve.engine.config import EngineConfig
from pla_serve.server.engine.backend import EngineStartError
from pla_serve.server.engine.client import EngineClient, RestartPolicy
from pla_serve.server.engine.heartbeat import Heartbeat
from pla_serve.server.engine.process import EngineProcess, EngineSpec
from pla_serve.server.limits import Limits
from pla_serve.wire.engine import EngineReady
from tests.server.engine.test_supervision import READY, Observer, Script, add
from tests.server.fake_core import SILENT_SEED
from tests.server.server_harness import MODEL, Live, make_tokenizer, until

HELLO = [{"role": "user", "content": "hello"}]
SOON = Limits(engine_silence_seconds=2.0)


def test_silence_is_counted_in_beats() -> None:
    heart = Heartbeat(3.0, beat_seconds=1.0)
    assert not any(heart.beat() for _ in range(3))
    heart.heard()
    assert [heart.beat() for _ in range(4)] == [False, False, False, True]


def test_one_late_beat_is_no_silence() -> None:
    """However late it is: the answer may lie unread because this process was held."""
    assert not Heartbeat(0.001, beat_seconds=1.0).beat()


def stop_engine(server: Live) -> int:
    pid = server.instance.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


def check_recovery(server: Live, prompt_answer: str | None) -> None:
    """A request in flight is told, /ready says so, and the next engine serves."""
    with server.client() as client:
        stream = client.chat.completions.create(
            model=MODEL, messages=HELLO, seed=SILENT_SEED, stream=True, max_tokens=400,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        hung = stop_engine(server)
        with pytest.raises(openai.APIError, match="did not answer for 2 s"):
            list(stream)
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "the next engine")
        assert server.instance.engine.pid != hung
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40)
        if prompt_answer is not None:
            assert answer.choices[0].message.content == prompt_answer
    assert server.metric("pla_serve:engine_restarts_total") == 1


def test_a_stopped_engine_is_replaced(serve: Callable[..., Live]) -> None:
    check_recovery(serve(limits=SOON), "<user>hello<assistant>")


def test_a_stopped_real_engine_is_replaced(serve: Callable[..., Live], tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=256, bos_token_id=None,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", threads=1, kv_cache_gib=0.02, device="cpu"
    )
    server = serve(ready=False, limits=SOON, engine=config)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "readiness")
    check_recovery(server, None)


class Mute(Script):
    """Never answers a ping. Counts how often it was killed."""

    killed = 0

    def kill(self) -> None:
        self.killed += 1
        with suppress(asyncio.InvalidStateError):  # at the end of a test nobody waits for it
            self.end("killed")


def beating_client(script: Script) -> EngineClient:
    return EngineClient(
        EngineSpec(EngineConfig()),
        Observer(),
        restarts=RestartPolicy(tries=3, base_seconds=0.0),
        start=script,  # type: ignore[arg-type]
        silence_seconds=0.002,
        beat_seconds=0.001,
    )


def test_an_engine_that_loads_may_be_silent() -> None:
    async def main() -> None:
        script = Mute(True)
        loads = asyncio.Event()

        async def deliver_later(deliver: Callable[[EngineReady], None]) -> None:
            await loads.wait()
            deliver(READY)

        def start(spec: EngineSpec, *, deliver: Callable[..., None], ended: object) -> Script:
            script.end = ended  # type: ignore[assignment]
            tasks.append(asyncio.create_task(deliver_later(deliver)))
            return script

        tasks: list[asyncio.Task[None]] = []
        client = beating_client(start)  # type: ignore[arg-type]
        run = asyncio.create_task(client.run())
        await asyncio.sleep(0.05)  # fifty beats
        assert script.killed == 0
        run.cancel()
        for task in tasks:
            task.cancel()

    asyncio.run(main())


def test_what_is_in_flight_is_told_of_a_hang_at_once() -> None:
    async def main() -> None:
        script = Mute(True, True, True)
        client = beating_client(script)
        run = asyncio.create_task(client.run())
        await client.ready()
        session = client.session(10)
        session.submit(add("a"))
        with pytest.raises(Exception, match="did not answer"):
            await session.receive()
        assert script.killed == 1
        run.cancel()

    asyncio.run(main())


class Refusing(Script):
    """The system has no process for the second life."""

    def __call__(self, *args: object, **rest: object) -> Script:
        if self.started == 1:
            self.started += 1
            raise OSError(24, "Too many open files")
        return super().__call__(*args, **rest)  # type: ignore[arg-type]


def test_a_failed_spawn_is_a_failed_start_and_not_the_end() -> None:
    async def main() -> int:
        script = Refusing(True, True, True)
        client = EngineClient(
            EngineSpec(EngineConfig()),
            Observer(),
            restarts=RestartPolicy(tries=5, base_seconds=0.0),
            start=script,  # type: ignore[arg-type]
        )
        run = asyncio.create_task(client.run())
        await client.ready()
        script.end("died")
        while script.started < 3:
            await asyncio.sleep(0)
        await client.ready()
        await client.stop()
        await run
        return script.started

    assert asyncio.run(main()) == 3


def test_spawns_that_always_fail_end_with_the_reason() -> None:
    def start(*args: object, **rest: object) -> EngineProcess:
        raise OSError(24, "Too many open files")

    client = EngineClient(EngineSpec(EngineConfig()), Observer(), start=start)
    with pytest.raises(EngineStartError, match=r"cannot be started: .*Too many open files"):
        asyncio.run(client.run())


def test_a_spawn_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        before = set(os.listdir("/proc/self/fd"))
        spec = EngineSpec(EngineConfig())

        def fail(spec: EngineSpec) -> object:
            raise OSError(11, "Resource temporarily unavailable")

        monkeypatch.setattr("pla_serve.server.engine.process.spawn", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="temporarily"):
                EngineProcess(spec, deliver=print, ended=print)
        after = set(os.listdir("/proc/self/fd"))
        assert len(after) <= len(before) + 1

    asyncio.run(main())
