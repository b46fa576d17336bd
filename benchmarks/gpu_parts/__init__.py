"""The parts of ``benchmarks/gpu.py``."""

LEAK_SECONDS = 20.0
"""Of mixed load, unless more is asked for."""
