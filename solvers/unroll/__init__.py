"""Differentiation through inner steps: the trajectory, reverse mode and forward mode."""
