"""One run: the loop, its budget, evaluation, and everything around it."""
