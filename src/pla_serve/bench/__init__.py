"""Workloads, an open-loop load generator, and reports."""
