"""Moves instances between the pools, and says how many there should be."""
