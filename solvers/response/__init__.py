"""The best response of a network: its Jacobian Θ, per-example weights and response rules."""
