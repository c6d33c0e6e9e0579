"""The best response of a network: Θ, per-example weights and their rules."""
