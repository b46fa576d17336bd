"""The process that hosts one engine."""
