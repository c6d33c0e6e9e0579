"""Linear regression with input dropout: Δ-STN's response against the closed form."""

from benchmarks.toy_page import experiment

EXPERIMENT = experiment("input dropout", "input_dropout")
