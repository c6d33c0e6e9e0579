"""The time of one hypergradient in this package and in other libraries, at the same value."""
