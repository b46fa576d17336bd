"""Whole passes of fixed shape: CUDA graphs, or the same without capture on other devices."""
