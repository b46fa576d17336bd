"""The device as the host sees it: marks in its stream of work, and captured graphs."""
