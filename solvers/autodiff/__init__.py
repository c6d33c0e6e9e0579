"""Automatic differentiation: pullbacks, linearized predictions, decomposed operations."""
