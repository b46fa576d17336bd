"""Runs batches: the model runner, executors, captured shapes and compiled layers."""
