"""The parts of ``benchmarks/gpu.py``.

A machine for measurements may not have the project installed: this makes ``src`` importable.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if find_spec("pla_serve") is None:
    sys.path.insert(0, str(ROOT / "src"))
