"""Process that hosts one engine, and what a parent process shares with its children."""
