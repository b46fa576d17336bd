"""Writes what a reader finds in an answer as content blocks, and as the events that build them."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from pla_serve.server.api.formats import Json
from pla_serve.server.api.read_format import sound
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerText,
    CallArguments,
    CallBegins,
    Reasoning,
)


class BlockWriter:
    """Turns what a reader finds into events. One block is open at a time.

    White space that would be all of a text block is left out.
    """

    def __init__(self) -> None:
        self.index = -1
        """Place of the block that is open, or was last."""
        self._open: str | None = None
        self._blank = ""
        self._thought = hashlib.sha256()

    def push(self, events: Iterable[AnswerEvent]) -> list[Json]:
        """Return the events of the next part of an answer."""
        found: list[Json] = []
        for event in events:
            if isinstance(event, AnswerText):
                self._text(sound(event.text), found)
            elif isinstance(event, Reasoning):
                self._reasoning(sound(event.text), found)
            elif isinstance(event, CallBegins):
                self._begin("tool_use", _call(event.name), found)
            elif isinstance(event, CallArguments):
                self._delta({"type": "input_json_delta", "partial_json": sound(event.text)}, found)
        return found

    def close(self) -> list[Json]:
        """Return the events that end the block that is open."""
        found: list[Json] = []
        self._end(found)
        return found

    def _text(self, text: str, found: list[Json]) -> None:
        if self._open != "text":
            self._blank += text
            if not self._blank.strip():
                return
            text = self._blank
            self._begin("text", {"type": "text", "text": "", "citations": None}, found)
        self._delta({"type": "text_delta", "text": text}, found)

    def _reasoning(self, text: str, found: list[Json]) -> None:
        if self._open != "thinking":
            self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""}, found)
        self._thought.update(text.encode())
        self._delta({"type": "thinking_delta", "thinking": text}, found)

    def _begin(self, kind: str, block: Json, found: list[Json]) -> None:
        self._end(found)
        self._open, self.index = kind, self.index + 1
        found.append({"type": "content_block_start", "index": self.index, "content_block": block})

    def _delta(self, delta: Json, found: list[Json]) -> None:
        found.append({"type": "content_block_delta", "index": self.index, "delta": delta})

    def _end(self, found: list[Json]) -> None:
        self._blank = ""
        if self._open is None:
            return
        if self._open == "thinking":
            # Clients send back only what is signed. Nobody checks it here.
            signature = self._thought.hexdigest()
            self._delta({"type": "signature_delta", "signature": signature}, found)
            self._thought = hashlib.sha256()
        self._open = None
        found.append({"type": "content_block_stop", "index": self.index})


def assembled(events: Iterable[Json]) -> list[Json]:
    """Return the content blocks that ``events`` build."""
    blocks: list[Json] = []
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            if "partial_json" in delta:
                index = event["index"]
                arguments[index] = arguments.get(index, "") + delta["partial_json"]
    for index, text in arguments.items():
        blocks[index]["input"] = read_input(text)
    return blocks


def read_input(text: str) -> dict[str, Any]:
    """Return the arguments of a call; of one that was cut, what there is of it."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        found = _read_unsound(text)
    return found if isinstance(found, dict) else {}


def _read_unsound(text: str) -> Any:
    """Return the value of JSON with halves of characters or line breaks in strings, else None."""
    try:
        found = json.loads(text, strict=False)
        return from_json(sound(json.dumps(found, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None


def _call(name: str) -> Json:
    id = f"toolu_{uuid.uuid4().hex[:24]}"
    caller = {"type": "direct"}
    return {"type": "tool_use", "id": id, "name": sound(name), "input": {}, "caller": caller}
