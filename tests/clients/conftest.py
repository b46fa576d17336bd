"""A live server whose model follows scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_core import TURN
from tests.server.server_harness import Live

TEMPLATE = (
    "{# tools #}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}"
    "{% endfor %}" + TURN
)


class ScriptedServer:
    """A server, and what its model says."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scripts.json"
        self._scripts: dict[str, list[str]] = {}
        self._file.write_text("{}")
        self.live = Live(
            tool_parser="hermes",
            reasoning_parser="qwen3",
            chat_template=TEMPLATE,
            context=500_000,
            env={"FAKE_SCRIPTS": str(self._file), "FAKE_TOKENS_PER_STEP": "4"},
        )
        self.live.wait_ready()
        self.url = f"{self.live.url}/v1"

    def say(self, about: str, *answers: str) -> None:
        """Let the model answer conversations in which ``about`` is said, turn by turn."""
        others = self._scripts.keys() - {about}
        assert not any(about in other or other in about for other in others), "not told apart"
        self._scripts[about] = list(answers)
        self._file.write_text(json.dumps(self._scripts))


def call(name: str, **arguments: Any) -> str:
    """Return a call as the family ``hermes`` writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    yield server
    server.live.close()
