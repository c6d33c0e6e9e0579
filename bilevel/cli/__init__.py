"""The command line: what Hydra composes, and how bad input is told."""
