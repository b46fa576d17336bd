"""The parts of ``benchmarks/simulated.py``."""
