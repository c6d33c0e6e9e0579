"""Networks with dropout sites."""
