"""Tasks of clients with many dependencies; each is a program for an environment of its own."""
