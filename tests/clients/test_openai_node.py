"""The official client for Node."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.clients.conftest import ScriptedServer, call
from tests.clients.npm import installed
from tests.server.server_harness import MODEL

TASK = Path(__file__).with_name("openai_task.mjs")


def test_chat_tools_and_responses(scripted: ScriptedServer) -> None:
    folder = installed(openai="7.59.0")
    for api in ("chat", "tool runner", "responses"):
        paris = call("get_weather", city="Paris")
        scripted.say(f"Weather by {api} from Node", paris, "It is sunny.")
    shutil.copy(TASK, folder)
    command = ["node", TASK.name, scripted.url, MODEL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout == "all done\n", done.stderr
