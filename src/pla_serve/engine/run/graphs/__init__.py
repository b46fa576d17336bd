"""Forward passes of fixed shape: CUDA graphs, or the same passes uncaptured on other devices."""
