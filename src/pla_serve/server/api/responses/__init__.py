"""OpenAI's Responses API, translated into chat requests and back."""
