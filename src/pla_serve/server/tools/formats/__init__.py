"""One file for each way in which a family of models writes tool calls."""
