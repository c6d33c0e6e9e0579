"""Data streams: tensors, loaders, and their random state."""
