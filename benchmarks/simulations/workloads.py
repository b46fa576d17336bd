"""The traces, loads and the machine that the claims are about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pla_serve.simulator.machine import load_machine
from pla_serve.simulator.setting import Setting
from pla_serve.traces.load import Trace, load_trace

MACHINE = "h200-qwen2.5-32b"
LOADS = (0.7, 0.9)
LONGEST_INPUT = 131_072
"""Tokens; longer prompts are left out."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A trace of the claims."""

    label: str
    """For tables and pictures."""
    spec: str
    """As `traces.load` reads it, with ``{}`` for the folder of the files."""


SOURCES = (
    Source("conversation", "{}mooncake_conversation.csv.gz"),
    Source("synthetic", "{}mooncake_synthetic.csv.gz"),
    Source("coding agent", "{}claude_code_weka.csv.gz"),
    Source(
        "chat + long",
        "mix:{}lmsys_user_messages_10k.csv.gz@0.9+{}mooncake_conversation.csv.gz:min-new=2049@0.1",
    ),
)


def setting(*, preemption: bool = True, seed: int = SEED) -> Setting:
    """One instance that prefills."""
    return Setting(load_machine(MACHINE), seed=seed, preemption=preemption)


def read(source: Source, folder: Path, requests: int | None = None) -> Trace:
    """A trace from the folder.

    Args:
        requests: only so many, the first ones.

    Raises:
        ValueError: the file is not there, or not a trace.
    """
    spec = source.spec.replace("{}", f"{folder}/")
    return load_trace(spec, seed=SEED, max_input_tokens=LONGEST_INPUT, max_requests=requests)
