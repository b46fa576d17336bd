"""Tensor parallelism: each rank computes a share of every layer of one model."""
