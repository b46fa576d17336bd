"""Parts of the benchmarks of routers."""
