"""Checkpoints: the files that a run resumes from."""
