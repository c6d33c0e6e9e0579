"""Checks of a problem before a run: laws, and the solvers that can tune it."""
