"""The command line: configuration by Hydra, sweeps, resuming, and sentences about bad input."""
