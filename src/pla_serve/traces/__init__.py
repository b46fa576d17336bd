"""Traffic as numbers: readers of recorded traces, a generator, mixtures. No text, no machine."""
