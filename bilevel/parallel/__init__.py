"""One run on several processes of PyTorch's own engine: every rank holds everything but its share of each batch."""
