"""Requests inside the engine: their sequences, their admission and their KV memory."""
