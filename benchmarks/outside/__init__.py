"""Tests and numbers that others published, remade with our solvers: one module for each source."""
