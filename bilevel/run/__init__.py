"""A run: the loop, budgets, evaluation, resuming, signals and failures."""
