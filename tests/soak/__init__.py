"""Long forms of tests in `make test`: a matrix of kills, thousands of fuzzed inputs, long runs."""
