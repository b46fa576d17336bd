"""KV from one engine to another: the receiving side reads, nobody writes elsewhere."""
