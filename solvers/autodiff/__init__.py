"""Automatic differentiation: pull-backs, linearized predictions, decompositions of fused operations."""
