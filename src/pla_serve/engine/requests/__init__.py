"""One request inside the engine: its sequence, its admission, its memory."""
