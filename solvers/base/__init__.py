"""The parts that all methods share: inner training, the outer loop, the dry run at set-up."""
