"""Helpers for tests of offline batches: input files, waiting, and a checker of what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import openai
from openai.types import Batch

from tests.server.server_harness import until

CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def chat_line(id: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def submit(client: openai.OpenAI, content: bytes, **options: Any) -> Batch:
    """Upload an input file, and make a batch of it."""
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    options = {"endpoint": CHAT, "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file.id, **options)


def wait_over(client: openai.OpenAI, id: str) -> Batch:
    def over() -> Batch | None:
        batch = client.batches.retrieve(id)
        return batch if batch.status in OVER else None

    found = until(over, f"the end of {id}")
    assert isinstance(found, Batch)
    return found


def read_lines(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    if file is None:
        return []
    return [json.loads(line) for line in client.files.content(file).content.splitlines()]


def check_answers(client: openai.OpenAI, batch: Batch, asked: Iterable[str]) -> None:
    """Check that each line of a completed batch has one answer, in one of the two files."""
    good = read_lines(client, batch.output_file_id)
    bad = read_lines(client, batch.error_file_id)
    ids = [line["custom_id"] for line in (*good, *bad)]
    assert sorted(ids) == sorted(asked), "lost, or answered twice"
    assert all(line["response"]["status_code"] == 200 for line in good)
    assert all(line["error"] or line["response"]["status_code"] >= 400 for line in bad)
    assert len({line["id"] for line in (*good, *bad)}) == len(ids)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (len(ids), len(good), len(bad))
