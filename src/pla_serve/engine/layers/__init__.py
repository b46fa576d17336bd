"""Faster modules in place of stock ones, for CPUs and GPUs, and the kernels below them."""
