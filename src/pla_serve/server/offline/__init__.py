"""Offline batches: files of requests that are answered when nobody waits."""
