"""What a step costs: measured and printed here, never asserted in a timed test."""
