"""Optimizers: trained tensors, differentiable updates, learning-rate schedules."""
