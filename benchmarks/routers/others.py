"""The routers of others, from PyPI, each in a virtual environment of its own."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

SGLANG_ROUTER, VLLM_ROUTER = "sglang-router==0.3.2", "vllm-router==0.1.17"


def prepare(folder: Path, requirement: str) -> Path:
    """The Python of an environment with this package; made if it is not there.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    python = folder / requirement.partition("==")[0] / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
    return python


def sglang_router(python: Path, port: int, workers: Sequence[str], policy: str) -> list[str]:
    """A command line. Health checks, circuit breaker and thresholds are its defaults; retries too.

    `bucket` exists for the prefill stage of a PD deployment only, which SGLang servers alone can be
    (the router talks to their bootstrap ports), so it has no place in front of other servers.
    """
    return [
        *(str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"),
        *("--port", str(port), "--policy", policy, "--worker-urls", *workers),
        *("--prometheus-port", str(port + 1), "--log-level", "warn"),
    ]


def vllm_router(python: Path, port: int, workers: Sequence[str], policy: str) -> list[str]:
    """A command line, with its defaults."""
    return [
        *(str(python.with_name("vllm-router")), "--host", "127.0.0.1", "--port", str(port)),
        *("--policy", policy, "--worker-urls", *workers),
        *("--prometheus-port", str(port + 1), "--log-level", "warning"),
    ]
