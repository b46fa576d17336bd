"""Batches as data: flat tokens, block tables, and the buffers that carry them to a device."""
