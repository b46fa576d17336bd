"""Memory of an engine process: prompts of many lengths do not make it grow without a bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pla_serve.engine.layers.cpu.linear import packs
from pla_serve.server.engine.process import ENVIRONMENT

LINEARS_OF_MANY_LENGTHS = """
import os
import psutil
import torch
from pla_serve.engine.layers.cpu.linear import PackedLinear

torch.set_num_threads(1)
linears = [PackedLinear(torch.randn(width, 64), None) for width in (64, 96, 128, 160)]
def multiply(lengths):
    for length in lengths:
        for linear in linears:
            linear(torch.randn(length, 64))
    return psutil.Process().memory_info().rss
start = multiply(range(33, 65))
print((multiply(range(65, 65 + 320)) - start) >> 20)
"""


@pytest.mark.skipif(not packs(torch.float32), reason="this torch does not pack weights")
def test_linears_of_many_lengths_are_forgotten() -> None:
    """Packed linears see 320 numbers of tokens; with the caches' default of 1,024 entries the
    process grows by more than 400 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", LINEARS_OF_MANY_LENGTHS],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 150
