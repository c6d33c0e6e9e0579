"""A linear network with an input-gradient penalty: Δ-STN's response against the closed form."""

from benchmarks.toy_page import experiment

EXPERIMENT = experiment("linear network", "linear_network")
