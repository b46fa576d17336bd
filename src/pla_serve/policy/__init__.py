"""Decides what runs next, and when to wait. Numbers in, numbers out: no torch, no I/O, no clock."""
