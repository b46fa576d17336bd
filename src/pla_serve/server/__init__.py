"""One instance that speaks the OpenAI API."""
