"""Claude Code edits a file through a server, with a stand-in for a model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents.scripted import call, script
from tests.server.conftest import serve  # noqa: F401
from tests.server.server_harness import Live

PROGRAM = Path(__file__).parent / "node_modules/@anthropic-ai/claude-code-linux-x64/claude"
ARGUMENTS = ("--model", "stand-in", "--output-format", "json", "--allowedTools", "Read,Edit")
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}
"""It asks nothing of its vendor."""
SECONDS = 120


@pytest.mark.skipif(not PROGRAM.exists(), reason="there is no build for this machine")
@pytest.mark.parametrize("thinks", [False, True])
def test_it_edits_a_file(serve: Callable[..., Live], tmp_path: Path, thinks: bool) -> None:  # noqa: F811
    target = tmp_path / "hello.py"
    target.write_text("print('hello')\n")
    thought = "<think>\nI read it first.\n</think>\n\n" if thinks else ""
    answers = (
        f"{thought}Let me look.\n{call('Read', file_path=str(target))}",
        call("Edit", file_path=str(target), old_string="hello", new_string="goodbye"),
        "It says goodbye now.",
    )
    live = serve(
        chat_template=script(answers, "Goodbye"),
        tool_parser="hermes",
        reasoning_parser="qwen3",
        model_names=("stand-in",),
        api_keys=("secret",),
        context=8192,
    )
    home = tmp_path / "home"
    home.mkdir()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": live.url,
        "ANTHROPIC_API_KEY": "secret",
        **QUIET,
    }
    done = subprocess.run(
        [PROGRAM, "-p", "Make hello.py say goodbye.", *ARGUMENTS],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert (answer["is_error"], answer["result"]) == (False, answers[-1])
    assert target.read_text() == "print('goodbye')\n"
