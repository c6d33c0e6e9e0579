"""A user's own training loop drives a solver, batch by batch."""
