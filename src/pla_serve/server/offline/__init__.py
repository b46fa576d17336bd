"""Offline batches: files of requests that are answered in time that others leave."""
