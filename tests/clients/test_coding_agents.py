"""Coding agents from npm: each mends a file through calls of its own tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import ScriptedServer, call
from tests.clients.npm import installed
from tests.server.server_harness import MODEL

TASK = "Mend the typo in hello.txt"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "hello.txt").write_text("hello wrold\n")
    return folder


def run(command: list[str | Path], project: Path, **env: str) -> str:
    """Run an agent in the project, with a home folder of its own."""
    home = project.with_name("home")
    home.mkdir()
    done = subprocess.run(
        command,
        cwd=project,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_codex(scripted: ScriptedServer, project: Path) -> None:
    """OpenAI's Codex speaks the Responses API and edits with commands of a shell."""
    tool = installed(**{"@openai/codex": "0.171.0"}) / "node_modules/.bin/codex"
    mends = call("exec_command", cmd="sed -i s/wrold/world/ hello.txt")
    scripted.say(f"{TASK} with Codex", "I look." + mends, "The typo is mended.")
    provider = f'{{name="here", base_url="{scripted.url}", env_key="KEY", wire_api="responses"}}'
    settings = {
        "model": f'"{MODEL}"',
        "model_provider": '"here"',
        "model_providers.here": provider,
    }
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    said = run([tool, "exec", *flags, *words, f"{TASK} with Codex"], project, KEY="k")
    assert said.strip() == "The typo is mended."
    assert (project / "hello.txt").read_text() == "hello world\n"


def test_qwen_code(scripted: ScriptedServer, project: Path) -> None:
    """Qwen Code speaks chat completions, reads the file and edits it."""
    tool = installed(**{"@qwen-code/qwen-code": "0.15.10"}) / "node_modules/.bin/qwen"
    path = str(project / "hello.txt")
    scripted.say(
        f"{TASK} with Qwen Code",
        call("read_file", file_path=path),
        call("edit", file_path=path, old_string="wrold", new_string="world"),
        "The typo is mended.",
    )
    options = ["--auth-type", "openai", "--openai-api-key", "k", "--openai-base-url", scripted.url]
    said = run([tool, *options, "-m", MODEL, "-y", "-p", f"{TASK} with Qwen Code"], project)
    assert said.strip() == "The typo is mended."
    assert (project / "hello.txt").read_text() == "hello world\n"
