"""Architecture search by relaxation (DARTS)."""
