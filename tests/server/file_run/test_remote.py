"""``pla-serve batch`` against live servers, with and without files and batches."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pla_serve.server.file_run.input import read_input
from pla_serve.server.file_run.output import OutputFile
from pla_serve.server.file_run.progress import RunProgress
from pla_serve.server.file_run.remote import RemoteServer, remote_server
from pla_serve.server.file_run.remote_batches import RemoteBatches
from pla_serve.server.file_run.run import FileRun
from pla_serve.server.offline.lines import LineRequest
from pla_serve.server.offline_options import OfflineOptions
from tests.command_runner import pla_serve
from tests.server.offline.batch_client import chat_line, jsonl
from tests.server.server_harness import Live, until

LINES = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """One that keeps no batches."""
    live = Live(env={"FAKE_PAUSE": "0.004"})
    live.wait_ready()
    yield live
    live.stop()


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One that keeps batches, for a key."""
    folder = tmp_path_factory.mktemp("batches")
    live = Live(offline=OfflineOptions(folder, batch_free_mib=0), api_keys=("key",))
    live.wait_ready()
    yield live
    live.stop()


def lines(count: int = LINES) -> list[dict[str, Any]]:
    mixed = [chat_line(f"{i}", f"{i}") for i in range(count)]
    mixed[3] = chat_line("3", nonsense=1)
    body = {"prompt": "x", "max_tokens": 3}
    url = "/v1/completions"
    mixed[5] = {"custom_id": "5", "method": "POST", "url": url, "body": body}
    return mixed


def check(path: Path, count: int = LINES) -> None:
    """Check that each line has one answer."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(line["id"] for line in found) == sorted(
        f"batch_req_{n}" for n in range(1, count + 1)
    )
    for line in found:
        assert line["id"] == f"batch_req_{int(line['custom_id']) + 1}"
        assert line["response"]["status_code"] == (400 if line["custom_id"] == "3" else 200)
    kinds = {line["response"]["body"].get("object") for line in found}
    assert kinds == {"chat.completion", "text_completion", None}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, server: Live, seed: int) -> None:
    (tmp_path / "in").write_bytes(jsonl(lines()))
    output, choose = tmp_path / "out", random.Random(seed)
    words = ["batch", str(tmp_path / "in"), "-o", str(output), "--lines-at-once", "3"]
    command = [sys.executable, "-m", "pla_serve", *words, "--base-url", server.url + "/v1"]

    def answered() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    for how in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
            goal = min(answered() + choose.randrange(1, LINES // 3), LINES - 10)
            until(lambda g=goal: answered() >= g, "some more answers")  # type: ignore[misc]
            child.send_signal(how)
            _, told = child.communicate()
        assert child.returncode == (-9 if how == signal.SIGKILL else 130)
        if how == signal.SIGKILL:
            with output.open("ab") as file:
                file.write(b'{"id":"batch_req_59","custom_id":"58","resp')
        else:
            assert b"Start again to go on" in told
    assert answered() < LINES
    result = pla_serve(*words, "--base-url", server.url)
    assert result.exit_code == 0, result.output
    check(output)


def test_through_files_and_batches(tmp_path: Path, keeper: Live) -> None:
    """A run that is stopped leaves its batch to the next one."""
    (tmp_path / "in").write_bytes(jsonl(lines()))
    asked = read_input(tmp_path / "in", 10_000)
    made = 0

    async def run(server: RemoteServer, stop_in_first: bool) -> None:
        nonlocal made
        output = OutputFile(tmp_path / "out")
        try:
            found = FileRun(asked, output, RunProgress(LINES, 0))
            batches = RemoteBatches(server, found, poll_seconds=0.01)
            task = asyncio.create_task(batches.run())
            client = httpx.AsyncClient(base_url=keeper.url, headers={"authorization": "Bearer key"})
            async with client:
                while stop_in_first and made == 0:
                    made = len((await client.get("/v1/batches")).json()["data"])
                    await asyncio.sleep(0.005)
                if stop_in_first:
                    task.cancel()
                await asyncio.wait({task})
                assert task.cancelled() == stop_in_first
                made = len((await client.get("/v1/batches")).json()["data"])
                if not stop_in_first:
                    assert (await client.get("/v1/files")).json()["data"] == []
        finally:
            output.close()

    async def main() -> None:
        async with remote_server(keeper.url, "key") as server:
            assert await server.keeps_batches()
            await run(server, stop_in_first=True)
            await run(server, stop_in_first=False)

    asyncio.run(main())
    assert made == 3, "one for each endpoint and place"
    check(tmp_path / "out")


def test_the_command_through_batches(tmp_path: Path, keeper: Live) -> None:
    (tmp_path / "in").write_bytes(jsonl([*lines(9), {"custom_id": "wrong"}]))
    words = ("batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--base-url", keeper.url)
    refused = pla_serve(*words)
    assert refused.exit_code == 1
    assert "give --api-key" in refused.stderr
    result = pla_serve(*words, env={"PLA_SERVE_BATCH_API_KEY": "key"})
    assert result.exit_code == 0, result.output
    assert "(1 with an error)" in result.stderr
    found = (tmp_path / "out").read_bytes().splitlines()
    assert len(found) == 10
    assert json.loads(found[0])["error"]["code"] == "invalid_line"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--base-url", "nonsense"], "--base-url is like"),
        (["--base-url", "http://[::1"], "--base-url"),
        (["--api-key", "k"], "--api-key does nothing without --base-url"),
        (["--base-url", "http://127.0.0.1:1", "--max-batch-tokens", "9"], "--max-batch-tokens is"),
        (["--policy", "fcfs", "--long-share", "0.4"], "does not use --long-share"),
        (["--base-url", "http://127.0.0.1:1", "-o", "IN"], "both input and output"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: list[str], why: str) -> None:
    (tmp_path / "in").write_bytes(jsonl(lines(9)))
    words = [str(tmp_path / "in") if word == "IN" else word for word in words]
    if "-o" not in words:
        words = [*words, "-o", str(tmp_path / "out")]
    result = pla_serve("batch", str(tmp_path / "in"), *words)
    assert result.exit_code == 1
    assert why in result.stderr
    assert "Traceback" not in result.output
    assert len((tmp_path / "in").read_bytes().splitlines()) == 9


def test_a_server_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:1", trust_env=False) as client:
            await RemoteServer(client, patience=0.0).keeps_batches()

    with pytest.raises(OSError, match="no connection to"):
        asyncio.run(main())


def test_answers_that_no_server_should_give() -> None:
    """They become answers of lines; none ends the run."""

    async def main() -> list[int]:
        replies = iter(
            [
                httpx.Response(200, content=b"<html>"),
                httpx.Response(200, content=b""),
                httpx.Response(500, content=b"\xff"),
                httpx.Response(429, json={}, headers={"retry-after": "Wed, 21 Oct 2026"}),
            ]
        )
        transport = httpx.MockTransport(lambda request: next(replies))
        async with httpx.AsyncClient(base_url="http://x", transport=transport) as client:
            server = RemoteServer(client)
            request = LineRequest("/v1/chat/completions", b"{}")
            return [(await server.send(request, "req-1")).status for _ in range(4)]

    assert asyncio.run(main()) == [502, 502, 502, 429]
