"""Paged KV cache: which blocks exist, who holds them, and which prefixes they spell."""
