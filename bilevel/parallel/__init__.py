"""One run on several processes: every rank holds all state and computes a shard of each batch."""
