"""Policies of other systems, as they were published, on the same protocol and cost model."""
