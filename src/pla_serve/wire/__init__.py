"""Typed messages that cross process boundaries: server and engine, router and instance."""
