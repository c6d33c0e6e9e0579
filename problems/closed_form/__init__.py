"""Problems whose best response, hypergradient and optimum are known."""
