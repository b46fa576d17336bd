"""Starts the processes of a fleet on this machine, and starts them again when they end."""
