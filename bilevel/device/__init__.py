"""The device of a run, and the precision of its products."""
