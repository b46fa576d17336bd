"""The page at ``/ui``: its samples, how they get there, and its files in ``static/``."""
