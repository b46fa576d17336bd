"""``kill -9`` of a server, and of its engine, at random moments of its batches.

However often that happens, each line has one answer in the end. The moments follow from a seed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.server.offline.batch_client import (
    OVER,
    chat_line,
    check_answers,
    jsonl,
    submit,
    wait_over,
)
from tests.server.server_harness import DEADLINE, ENGINE_PATH, until

LINES = 60
BATCHES = 2
KILLS = 2


@dataclass
class Process:
    child: subprocess.Popen[bytes]
    client: openai.OpenAI
    engine: int


@contextmanager
def running(folder: Path) -> Iterator[Process]:
    env = {**os.environ, "FAKE_PAUSE": "0.004", "PYTHONPATH": ENGINE_PATH}
    command = [sys.executable, "-m", "tests.server.serve_fake", "60", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        try:
            assert child.stdout is not None
            port, engine = child.stdout.readline().split()
            url = f"http://127.0.0.1:{int(port)}/v1"
            with openai.OpenAI(
                base_url=url, api_key="key", max_retries=0, timeout=DEADLINE
            ) as client:
                yield Process(child, client, int(engine))
        finally:
            child.kill()


def answered(client: openai.OpenAI) -> int:
    """Lines of all batches that have an answer; those of a batch that is over all count."""
    total = 0
    for batch in client.batches.list():
        counts = batch.request_counts
        assert counts is not None
        total += LINES if batch.status in OVER else counts.completed + counts.failed
    return total


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_each_line_has_one_answer(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    asked = {}
    with running(tmp_path) as process:
        for name in range(BATCHES):
            lines = [
                chat_line(f"{name}/{i}", nonsense=1) if choose.random() < 0.1
                else chat_line(f"{name}/{i}", "x" * choose.randrange(1, 30))
                for i in range(LINES)
            ]  # fmt: skip
            asked[submit(process.client, jsonl(lines)).id] = [line["custom_id"] for line in lines]
        # The first kill comes while the files are read, or soon after.
        process.child.kill()
    for _ in range(KILLS - 1):
        with running(tmp_path) as process:
            client = process.client
            goal = min(answered(client) + choose.randrange(1, 60), BATCHES * LINES)
            until(lambda c=client, g=goal: answered(c) >= g, "some more answers")  # type: ignore[misc]
            if seed % 2 or choose.random() < 0.5:
                os.kill(process.engine, signal.SIGKILL)  # the server starts another
            process.child.kill()
    with running(tmp_path) as process:
        for id, custom_ids in asked.items():
            batch = wait_over(process.client, id)
            assert batch.status == "completed"
            check_answers(process.client, batch, custom_ids)
        files = {file.id for file in process.client.files.list()}
        assert {path.name for path in (tmp_path / "files").iterdir()} == files
        assert len(files) == 3 * BATCHES
