"""Experiments of `docs/`: each module holds an `EXPERIMENT`, which makes a block of a page."""
