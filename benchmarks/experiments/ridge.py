"""Ridge regression: Δ-STN's response against the closed form."""

from benchmarks.toy_page import experiment

EXPERIMENT = experiment("ridge", "ridge")
