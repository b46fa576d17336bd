"""Real processes that end, hang and drain under the supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from pla_serve.fleet.supervisor.log_lines import write_line
from pla_serve.fleet.supervisor.member import FleetMember, FleetStartError, MemberState, Recipe
from pla_serve.fleet.supervisor.spec import Health
from pla_serve.fleet.supervisor.supervisor import Supervisor
from pla_serve.server.run import listen

SERVER = Path(__file__).parent / "fake_server.py"
QUICK = Health(check_seconds=0.02, hang_seconds=0.5, start_seconds=20, base_seconds=0.01)
DEADLINE = 120.0


class Fleet:
    """Members whose sockets are held here, with the lines that they wrote."""

    def __init__(self) -> None:
        self.listeners: list[socket.socket] = []
        self.lines: list[tuple[str, str]] = []

    def member(self, name: str, *words: str, health: Health = QUICK) -> FleetMember:
        listener = listen("127.0.0.1", 0)
        self.listeners.append(listener)
        descriptor = listener.fileno()
        command = [sys.executable, str(SERVER), str(descriptor), *words]
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        recipe = Recipe(name, command, url, has_engine="mute" in words, fds=(descriptor,))
        return FleetMember(recipe, health, lambda who, line: self.lines.append((who, line)))

    def lives(self, name: str) -> int:
        return sum(who == name and line.startswith("life") for who, line in self.lines)


@asynccontextmanager
async def running(*members: FleetMember) -> AsyncIterator[Supervisor]:
    """The last one is the router."""
    supervisor = Supervisor(members[:-1], members[-1], drain_seconds=5)
    task = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(DEADLINE):
            yield supervisor
    finally:
        supervisor.stop()
        await asyncio.wait_for(task, DEADLINE)
        assert all(member.pid is None for member in members)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Callable[[Fleet], object]) -> None:
    fleet = Fleet()
    try:
        asyncio.run(test(fleet))  # type: ignore[arg-type]
    finally:
        for listener in fleet.listeners:
            listener.close()


def test_killed_process_comes_back_on_the_same_port() -> None:
    async def test(fleet: Fleet) -> None:
        one, router = fleet.member("one"), fleet.member("router")
        async with running(one, router):
            await one.ready.wait()
            await router.ready.wait()
            first = one.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda: one.pid not in (first, None))
            await one.ready.wait()
            assert httpx.get(one.recipe.url).status_code == 200
            assert one.restarts == 1
            assert router.restarts == 0
            assert fleet.lives("one") == 2

    run(test)


def test_hung_process_is_killed_and_comes_back() -> None:
    async def test(fleet: Fleet) -> None:
        one, router = fleet.member("one"), fleet.member("router")
        async with running(one, router):
            await one.ready.wait()
            first = one.pid
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            await until(lambda: one.pid not in (first, None))
            await one.ready.wait()

    run(test)


def test_process_whose_engine_hangs_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Its server answers all the time."""

    async def test(fleet: Fleet) -> None:
        mark = tmp_path / "mark"
        one, router = fleet.member("one", "mute", str(mark)), fleet.member("router")
        async with running(one, router):
            await one.ready.wait()
            first = one.pid
            mark.touch()
            await until(lambda: one.pid not in (first, None))
            mark.unlink()
            await one.ready.wait()
            assert router.restarts == 0

    run(test)


def test_first_start_that_fails_ends_the_fleet(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        one = fleet.member("one", "fail-first", str(tmp_path / "mark"))
        other, router = fleet.member("other"), fleet.member("router")
        supervisor = Supervisor([one, other], router, drain_seconds=5)
        with pytest.raises(FleetStartError, match="one ended with status 3 before it was ready"):
            await asyncio.wait_for(supervisor.run(), DEADLINE)
        assert ("one", "this is why") in fleet.lines
        assert all(member.pid is None for member in (one, other, router))

    run(test)


def test_stop_ends_a_process_that_will_not_leave() -> None:
    async def test(fleet: Fleet) -> None:
        one, router = fleet.member("one", "stubborn"), fleet.member("router")
        supervisor = Supervisor([one], router, drain_seconds=30)
        task = asyncio.create_task(supervisor.run())
        await one.ready.wait()
        pid = one.pid
        assert pid is not None
        supervisor.stop()
        await until(lambda: router.state is MemberState.STOPPED and router.pid is None)
        assert psutil.pid_exists(pid)  # still has its time to drain
        supervisor.stop()  # a second signal does not wait
        await asyncio.wait_for(task, DEADLINE)
        assert one.pid is None

    run(test)


def test_stop_while_waiting_for_the_next_life_does_not_wait(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        slow = Health(check_seconds=0.02, base_seconds=3600, most_seconds=3600)
        one, router = fleet.member("one", health=slow), fleet.member("router")
        async with running(one, router):
            for _ in range(2):  # the first end is repaired at once
                await one.ready.wait()
                pid = one.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: one.pid != pid)  # type: ignore[misc]
            await until(lambda: one.state is MemberState.WAITING)

    run(test)


def test_rolling_restart_renews_everybody_and_one_at_a_time() -> None:
    async def test(fleet: Fleet) -> None:
        members = [fleet.member(name) for name in ("one", "two", "router")]
        async with running(*members) as supervisor:
            for member in members:
                await member.ready.wait()
            before = [member.pid for member in members]
            supervisor.renew()
            down = 0
            while any(m.pid == pid for m, pid in zip(members, before, strict=True)):
                down = max(down, sum(not member.ready.is_set() for member in members))
                await asyncio.sleep(0.005)
            await until(lambda: all(member.ready.is_set() for member in members))
            assert down == 1
            assert [fleet.lives(m.recipe.name) for m in members] == [2, 2, 2]

    run(test)


TAKE = """
import socket, sys
for address in (("127.0.0.1", int(sys.argv[1])), ("", int(sys.argv[1]))):
    for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        thief = socket.socket()
        if option is not None:
            thief.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            thief.bind(address)
            thief.listen()
            print("taken")
        except OSError:
            pass
"""


@pytest.mark.parametrize("how", ["killed", "renewed"])
def test_nobody_takes_the_port_of_a_process_between_its_lives(how: str, tmp_path: Path) -> None:
    """Another process cannot listen on it, and who connects meanwhile gets the next life."""

    async def test(fleet: Fleet) -> None:
        gate = tmp_path / "gate"
        gate.touch()
        one, router = fleet.member("one", "gate", str(gate)), fleet.member("router")
        port = one.recipe.url.rpartition(":")[2]
        async with running(one, router) as supervisor:
            await one.ready.wait()
            await router.ready.wait()
            first = one.pid
            assert first is not None
            gate.unlink()
            if how == "killed":
                os.kill(first, signal.SIGKILL)
            else:
                supervisor.renew()
            await until(lambda: fleet.lives("one") == 2)  # it has not begun to accept
            async with httpx.AsyncClient(timeout=DEADLINE) as client:
                early = asyncio.create_task(client.get(one.recipe.url))
                thief = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", TAKE, port, stdout=subprocess.PIPE
                )
                said, _ = await thief.communicate()
                assert said == b""
                assert not early.done()
                gate.touch()
                assert (await early).status_code == 200
            await one.ready.wait()

    run(test)


def test_a_process_that_drains_is_not_taken_for_hung() -> None:
    """It answers nobody any more, because connections wait for its next life."""

    async def test(fleet: Fleet) -> None:
        one, router = fleet.member("one", "slow-drain"), fleet.member("router")
        async with running(one, router):
            await one.ready.wait()
            await one.renew(10.0)
            assert ("one", "drained") in fleet.lines

    run(test)


def test_lines_say_whose_they_are() -> None:
    out: list[str] = []
    write_line("text", out.append)("short-0", "hello")
    write_line("json", out.append)("short-0", '{"message": "hello", "request_id": "r"}')
    write_line("json", out.append)("short-0", "plain")
    assert out[0] == "[short-0] hello\n"
    assert out[1] == '{"message":"hello","request_id":"r","process":"short-0"}\n'
    assert '"message":"plain"' in out[2]
    assert '"process":"short-0"' in out[2]


PARENT = """
import asyncio, sys
from pla_serve.fleet.supervisor.process import Child

async def main():
    command = [sys.executable, *sys.argv[1:]]
    child = await Child.start(command, {}, lambda line: None, [int(sys.argv[2])])
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell children")
def test_processes_leave_when_the_supervisor_is_killed() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        subprocess.Popen(
            [sys.executable, "-c", PARENT, str(SERVER), str(listener.fileno())],
            stdout=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        ) as parent,
    ):
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(DEADLINE)
