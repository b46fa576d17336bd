"""``pla-serve batch``: one input file of requests, answered into one output file."""
