"""Differentiation through inner steps: trajectory, reverse mode, forward mode."""
