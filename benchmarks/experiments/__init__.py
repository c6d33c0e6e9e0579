"""Experiments of `docs/`: each module holds an `EXPERIMENT`, and a block of a page is what it made."""
