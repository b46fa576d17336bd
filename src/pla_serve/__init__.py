"""PLA-Serve: LLM serving that schedules by prefill length."""

__version__ = "0.1.0"
