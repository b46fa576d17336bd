"""Runs batches on one device: models, KV cache, attention, preemption at layer boundaries."""
