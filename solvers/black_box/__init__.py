"""Black-box methods: search over λ and population-based training."""
