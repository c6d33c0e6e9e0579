"""Benchmarks measure and print the cost of a step; no test asserts a time."""
