"""Loggers: what a run records, and where it is written and drawn."""
