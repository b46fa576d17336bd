"""The policy inside other engines. Plugins import `policy` and their engine, nothing else."""
