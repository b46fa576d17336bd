"""Captured shapes: which batch goes into which, and which ones are worth capturing."""
