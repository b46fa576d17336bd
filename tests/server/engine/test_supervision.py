"""The engine process dies, or never lives: what clients see, and that the next one is served."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from pla_serve.engine.config import EngineConfig
from pla_serve.server.engine.backend import EngineStartError, EngineUnavailableError
from pla_serve.server.engine.client import EngineClient, EngineState, RestartPolicy
from pla_serve.server.engine.process import EngineSpec
from pla_serve.server.engine.session import EngineDiedError
from pla_serve.wire.engine import AddRequest, EngineReady, SamplingParams
from tests.server.fake_core import SILENT_SEED
from tests.server.server_harness import DEADLINE, ENGINE_PATH, MODEL, Live, until

HELLO = [{"role": "user", "content": "hello"}]
SILENT = {"messages": HELLO, "seed": SILENT_SEED}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Engines start only while this file exists; removed at the end of their test, never needed."""
    file = tmp_path / "gate"
    file.touch()
    yield file
    file.touch()


@pytest.fixture
def gated(serve: Callable[..., Live], gate: Path) -> Live:
    return serve(env={"FAKE_START_GATE": str(gate)})


def kill_engine(server: Live) -> None:
    pid = server.instance.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_killed_engine_fails_what_is_in_flight_and_serves_the_next(gated: Live, gate: Path) -> None:
    with gated.client() as client:
        stream = client.chat.completions.create(**SILENT, model=MODEL, stream=True)
        gate.unlink()
        kill_engine(gated)
        with pytest.raises(openai.APIError, match="killed by SIGKILL"):
            list(stream)
        assert httpx.get(f"{gated.url}/ready").json() == {"status": "restarting"}
        assert httpx.get(f"{gated.url}/health").status_code == 200
        gate.touch()
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
        assert answer.choices[0].message.content == "<user>hello<assistant>"
    assert gated.metric("pla_serve:engine_restarts_total") == 1
    assert gated.metric("pla_serve:engine_up") == 1
    assert httpx.get(f"{gated.url}/ready").status_code == 200


def test_killed_engine_answers_whole_requests_with_503(serve: Callable[..., Live]) -> None:
    server = serve()
    with httpx.Client(timeout=DEADLINE) as client, server.client() as openai_client:
        done = asyncio.new_event_loop()
        try:
            post = done.run_in_executor(
                None, lambda: client.post(f"{server.url}/v1/chat/completions", json=SILENT)
            )
            until(lambda: server.metric("vllm:num_requests_running") == 1, "running")
            kill_engine(server)
            response = done.run_until_complete(post)
        finally:
            done.run_until_complete(done.shutdown_default_executor())
            done.close()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert int(response.headers["retry-after"]) >= 1
        assert openai_client.chat.completions.create(model=MODEL, messages=HELLO).choices


def test_engine_that_takes_too_long_gives_503(serve: Callable[..., Live], gate: Path) -> None:
    gate.unlink()
    server = serve(ready=False, restart_wait=0.05, env={"FAKE_START_GATE": str(gate)})
    until(lambda: httpx.get(f"{server.url}/health").status_code == 200, "life")
    assert httpx.get(f"{server.url}/ready").json() == {"status": "starting"}
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    gate.touch()
    server.wait_ready()


def test_engine_that_cannot_start_ends_the_server_with_its_message() -> None:
    server = Live(model="broken")
    with pytest.raises(EngineStartError, match="there is no model called broken"):
        server.status.result(DEADLINE)
    server._thread.join(DEADLINE)


def test_engine_leaves_with_a_parent_that_is_killed() -> None:
    code = (
        "import asyncio, sys\n"
        "from pla_serve.engine.config import EngineConfig\n"
        "from pla_serve.server.engine.process import EngineProcess, EngineSpec\n"
        "async def main():\n"
        "    spec = EngineSpec(EngineConfig(), factory='tests.server.fake_core:FakeCore')\n"
        "    ready = asyncio.Event()\n"
        "    p = EngineProcess(spec, deliver=lambda m: ready.set(), ended=print)\n"
        "    await ready.wait()\n"
        "    print(p.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ENGINE_PATH},
    ) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert is_alive(engine)
        parent.kill()
    until(lambda: not is_alive(engine), "the engine's end")


def is_alive(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Observer:
    """Counts what the client reports."""

    def __init__(self) -> None:
        self.restarts = 0

    def ready(self, info: EngineReady) -> None: ...

    def stats(self, stats: object) -> None: ...

    def lost(self, reason: str) -> None: ...

    def alive(self) -> None: ...

    def restarted(self) -> None:
        self.restarts += 1


class Script:
    """Stands for `EngineProcess`: lives that become ready, or end at once."""

    def __init__(self, *lives: bool) -> None:
        self.lives = list(lives)
        self.started = 0
        self.grace: float | None = None
        self.end: Callable[[str], None] = lambda reason: None

    def __call__(
        self, spec: EngineSpec, *, deliver: Callable[..., None], ended: Callable[[str], None]
    ) -> Script:
        ready = self.lives[self.started]
        self.started += 1
        self.end = ended
        loop = asyncio.get_running_loop()
        loop.call_soon(deliver, READY) if ready else loop.call_soon(ended, "no luck")
        return self

    def send(self, message: object) -> None: ...

    def kill(self) -> None: ...

    async def stop(self, grace_seconds: float) -> None:
        self.grace = grace_seconds
        self.end("stopped")


READY = EngineReady(
    max_model_len=8,
    kv_tokens=8,
    kv_bytes_per_token=64,
    layers=2,
    vocab_size=8,
    device="x",
    dtype="x",
    policy="fcfs",
)


def make_client(script: Script, tries: int = 3) -> tuple[EngineClient, Observer]:
    observer = Observer()
    restarts = RestartPolicy(tries=tries, base_seconds=0.0)
    spec = EngineSpec(EngineConfig())
    client = EngineClient(spec, observer, restarts=restarts, start=script, max_waiting=1)  # type: ignore[arg-type]
    return client, observer


def test_first_start_is_not_tried_again() -> None:
    script = Script(False, True)
    client, _ = make_client(script)
    with pytest.raises(EngineStartError, match="no luck"):
        asyncio.run(client.run())
    assert script.started == 1


def test_restarts_are_bounded_and_counted() -> None:
    async def main() -> tuple[Script, Observer]:
        script = Script(True, False, False, False)
        client, observer = make_client(script)
        run = asyncio.create_task(client.run())
        await client.ready()
        script.end("died")
        with pytest.raises(EngineStartError, match="no luck"):
            await run
        assert client.state is EngineState.STOPPED
        return script, observer

    script, observer = asyncio.run(main())
    assert script.started == 3
    assert observer.restarts == 2


def test_sessions_fail_when_the_engine_dies_and_cannot_submit_until_it_is_back() -> None:
    async def main() -> None:
        script = Script(True, True)
        client, _ = make_client(script)
        run = asyncio.create_task(client.run())
        await client.ready()
        session = client.session(10)
        session.submit(add("a"))
        script.end("died")
        with pytest.raises(EngineDiedError, match="died"):
            await session.receive()
        with pytest.raises(EngineDiedError):
            session.submit(add("b"))
        await client.ready()
        client.session(10).submit(add("c"))
        await client.stop()
        await run

    asyncio.run(main())


@pytest.mark.parametrize(("loaded", "grace"), [(True, 5.0), (False, 0.0)])
def test_an_engine_that_still_loads_gets_no_grace(loaded: bool, grace: float) -> None:
    async def main() -> Script:
        script = Script(True)
        client, _ = make_client(script)
        run = asyncio.create_task(client.run())
        await asyncio.sleep(0)  # started; what it says comes in the next turn
        if loaded:
            await client.ready()
        await client.stop(5.0)
        await run
        return script

    assert asyncio.run(main()).grace == grace


def test_only_so_many_wait_for_an_engine() -> None:
    async def main() -> None:
        client, _ = make_client(Script(True))
        waiting = asyncio.create_task(client.wait_ready(DEADLINE))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError):
            await client.wait_ready(DEADLINE)
        run = asyncio.create_task(client.run())
        assert await waiting is READY
        await client.stop()
        await run

    asyncio.run(main())


def add(id: str) -> AddRequest:
    return AddRequest(id=id, prompt=[1], sampling=SamplingParams(max_tokens=1), arrival=0.0)


def test_delay_doubles_from_the_second_failure_on() -> None:
    restarts = RestartPolicy(base_seconds=1, most_seconds=5)
    assert [restarts.delay(n) for n in range(1, 6)] == [0, 1, 2, 4, 5]
