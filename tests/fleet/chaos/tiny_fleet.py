"""A real fleet of tiny random models in processes of its own, and who is who among them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

VOCABULARY = 512
CONTEXT = 4096
START_SECONDS = 180.0
METRICS_KEY = "key-for-metrics"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def write_model(folder: Path, **changes: object) -> Path:
    """A config whose random weights are the same in every process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@dataclass(frozen=True, slots=True)
class Process:
    """An instance or the router, in its present life."""

    role: str
    """short, long, decode or mixed, as it was started; router."""
    port: int
    pid: int
    engine: int | None
    """Process of its engine; None for the router, or while it starts."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        return [self.pid, *([self.engine] if self.engine else [])]


class TinyFleet:
    """What `start_fleet` gives: the API's address, and the processes behind it."""

    def __init__(self, child: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
        self.supervisor = child.pid
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._child = child
        self._log = log

    def processes(self) -> list[Process]:
        """All that live now, instances by port and then the router."""
        found = [self._describe(child) for child in psutil.Process(self.supervisor).children()]
        known = [process for process in found if process is not None]
        return sorted(known, key=lambda process: (process.role == "router", process.port))

    def instances(self) -> list[Process]:
        return [process for process in self.processes() if process.role != "router"]

    def router(self) -> Process | None:
        return next((p for p in self.processes() if p.role == "router"), None)

    def instance_key(self) -> str:
        """The key that instances ask for, from the environment of the router."""
        router = self.router()
        assert router is not None
        return psutil.Process(router.pid).environ()["PLA_SERVE_INSTANCE_KEY"]

    def ready(self, count: int) -> bool:
        """The router and so many instances take requests."""
        processes = self.processes()
        return len(processes) == count + 1 and all(is_ready(p.url) for p in processes)

    def wait_ready(self, count: int, seconds: float = START_SECONDS) -> None:
        """Raises:
        TimeoutError: it does not come (back); the message has the end of the log.
        """
        end = time.monotonic() + seconds
        while not self.ready(count):
            if self._child.poll() is not None:
                raise TimeoutError(f"the fleet ended with {self._child.returncode}\n{self.log(40)}")
            if time.monotonic() > end:
                raise TimeoutError(f"not all are ready after {seconds:.0f} s\n{self.log(40)}")
            time.sleep(0.1)

    def log(self, lines: int = 0) -> str:
        """The last lines of it; 0: all."""
        self._log.flush()
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _describe(self, child: psutil.Process) -> Process | None:
        try:
            words = child.cmdline()
            engines = [
                c.pid for c in child.children() if "pla_serve.engine.host.process" in c.cmdline()
            ]
        except psutil.Error:
            return None
        if "--port" not in words:
            return None  # not yet the program that it will be
        port = int(words[words.index("--port") + 1])
        role = words[words.index("--role") + 1] if "--role" in words else "router"
        return Process(role, port, child.pid, engines[0] if engines else None)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def start_alone(model: Path) -> Iterator[str]:
    """One instance without a fleet; gives its URL."""
    from tests.fleet.reserved_port import ReservedPort

    with ReservedPort() as port:
        command = [sys.executable, "-m", "pla_serve", "serve", str(model)]
        command += ["--load-format", "dummy", "--threads", "1", "--kv-cache-gib", "0.02"]
        child = subprocess.Popen(
            [*command, "--port", str(port.number), "--log-level", "warning"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            url, end = f"http://127.0.0.1:{port.number}", time.monotonic() + START_SECONDS
            while not is_ready(url):
                if child.poll() is not None or time.monotonic() > end:
                    raise TimeoutError("the instance does not start")
                time.sleep(0.1)
            yield url
        finally:
            child.terminate()
            child.wait(60)


@contextmanager
def start_fleet(
    model: Path, pools: Sequence[str], log: Path, *words: str, count: int
) -> Iterator[TinyFleet]:
    """``pla-serve fleet`` with these flags, until the block ends; it must leave with status 0.

    Args:
        pools: flags such as ``--short 2``.
        count: instances in all.
    """
    from pla_serve.fleet.supervisor.process import die_with_parent
    from tests.fleet.reserved_port import ReservedPort

    with ReservedPort() as reserved, log.open("wb") as out:
        port = reserved.number
        command = [sys.executable, "-m", "pla_serve", "fleet", str(model), *pools]
        command += ["--port", str(port), "--load-format", "dummy", "--threads", "1", *words]
        child = subprocess.Popen(
            command,
            env={**os.environ, "PLA_SERVE_METRICS_KEY": METRICS_KEY},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        fleet = TinyFleet(child, port, out)
        try:
            fleet.wait_ready(count)
            yield fleet
            child.send_signal(signal.SIGTERM)
            status = child.wait(60)
            assert status == 0, f"the fleet left with status {status}\n{fleet.log(40)}"
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Whatever is left of it."""
    if child.poll() is not None:
        return
    family = psutil.Process(child.pid).children(recursive=True)
    for process in (psutil.Process(child.pid), *family):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    child.wait()
