"""A run with endpoints that do as the test says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pla_serve.server.file_run import run as run_module
from pla_serve.server.file_run.input import read_input
from pla_serve.server.file_run.output import OutputFile
from pla_serve.server.file_run.progress import RunProgress
from pla_serve.server.file_run.run import FileRun
from pla_serve.server.offline.caller import Answered
from pla_serve.server.offline.lines import LineRequest
from tests.server.offline.batch_client import chat_line, jsonl

GOOD = Answered(200, b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}', None)

Answers = Callable[[str], Awaitable[Answered]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PAUSE_SECONDS", 0.0)


def run(folder: Path, answers: Answers, at_once: int = 4) -> tuple[FileRun, Counter[str]]:
    """Run over ``folder/in`` into ``folder/out``."""
    sent: Counter[str] = Counter()

    async def send(request: LineRequest, id: str) -> Answered:
        text = json.loads(request.body)["messages"][0]["content"]
        sent[text] += 1
        return await answers(text)

    asked = read_input(folder / "in", 10_000)
    output = OutputFile(folder / "out")

    async def main() -> FileRun:
        known = len(output.answered)
        found = FileRun(asked, output, RunProgress(len(asked.custom_ids) - known, known))
        await found.refuse_wrong_lines()
        await found.send_all(send, at_once)
        return found

    try:
        output.check(asked.custom_ids)
        return asyncio.run(main()), sent
    finally:
        output.close()


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was answered, by ``id``."""
    lines = [json.loads(line) for line in (folder / "out").read_bytes().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


async def good(text: str) -> Answered:
    return GOOD


def test_wrong_lines_fail_alone(tmp_path: Path) -> None:
    wrong = [
        b"no JSON",
        b'{"custom_id": "a"}',
        jsonl([chat_line("a")]).strip(),
        jsonl([chat_line("s", stream=True)]).strip(),
        b'{"custom_id":"u","method":"POST","url":"/v1/score","body":{}}',
        b'{"custom_id":"b","method":"POST","url":"/v1/chat/completions","body":' + b"[" * 9000,
        jsonl([chat_line("long", "x" * 80_000)]).strip(),
    ]
    lines = [jsonl([chat_line("a", "first")]).strip(), *wrong, b"", b"  "]
    (tmp_path / "in").write_bytes(b"\n".join(lines) + jsonl([chat_line("z", "last")]))
    done, sent = run(tmp_path, good)
    assert sent == {"first": 1, "last": 1}
    found = answers(tmp_path)
    assert set(found) == {f"batch_req_{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 10)}
    codes = [found[f"batch_req_{n}"]["error"]["code"] for n in range(2, 9)]
    assert codes == ["invalid_line"] * 6 + ["line_too_long"]
    assert found["batch_req_4"]["custom_id"] == "a"  # repeated
    assert (done.progress.done, done.progress.failed, done.progress.tokens) == (9, 7, 14)
    again, sent = run(tmp_path, good)
    assert not sent
    assert again.progress.done == 0
    assert answers(tmp_path) == found


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl(chat_line(f"{i}", f"{i}") for i in range(20)))

    async def full_at_seven(text: str) -> Answered:
        if text == "7":
            raise OSError("the server is gone")
        return GOOD

    with pytest.raises(OSError, match="gone"):
        run(tmp_path, full_at_seven)
    known = len(answers(tmp_path))
    assert 0 < known < 20
    done, sent = run(tmp_path, good)
    assert sent.total() == done.progress.done == 20 - known
    assert set(answers(tmp_path)) == {f"batch_req_{n}" for n in range(1, 21)}


def test_faults_of_the_server_are_tried_again(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl(chat_line(n, n) for n in ("flaky", "busy", "dead", "bad")))
    statuses = {
        "flaky": iter([500, 503, 200]),
        "busy": iter([429] * 9 + [200]),
        "dead": iter([500] * 9),
        "bad": iter([400]),
    }

    async def scripted(text: str) -> Answered:
        return Answered(next(statuses[text]), b"{}", None)

    done, sent = run(tmp_path, scripted)
    assert sent == {"flaky": 3, "busy": 10, "dead": 3, "bad": 1}
    found = {line["custom_id"]: line["response"] for line in answers(tmp_path).values()}
    assert {id: each["status_code"] for id, each in found.items()} == {
        "flaky": 200,
        "busy": 200,
        "dead": 500,
        "bad": 400,
    }
    assert done.progress.failed == 2


def test_lines_run_at_once_up_to_the_bound(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl(chat_line(f"{i}", f"{i}") for i in range(30)))
    running = most = 0

    async def counted(text: str) -> Answered:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return GOOD

    run(tmp_path, counted, at_once=5)
    assert most == 5


def test_an_input_that_changes_gives_errors(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(jsonl([chat_line("a", "a"), chat_line("b", "b")]))

    async def truncating(text: str) -> Answered:
        (tmp_path / "in").write_bytes(b"")
        return GOOD

    run(tmp_path, truncating, at_once=1)
    codes = [line["error"] and line["error"]["code"] for line in answers(tmp_path).values()]
    assert codes == [None, "input_file_changed"]
