"""Linear solves H x = v by products with H alone."""
