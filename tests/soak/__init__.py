"""The long forms of tests that `make test` has in small: kills over a matrix, thousands of fuzzed inputs, an hour's run."""
